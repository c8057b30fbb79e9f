"""The grader benchmark on a handful of calls: every side grades rightly. What it measures is not looked at."""

from __future__ import annotations

import json

import pytest

from benchmarks import sandbox
from tests.grading.sandbox.sandboxes import open_sandbox


def test_all_sides_grade_and_are_reported(capsys):
    open_sandbox().close()
    sandbox.main(["--json", "--repeats", "1", "--workers", "1", "--calls", "3", "--fresh-calls", "1"])
    report = json.loads(capsys.readouterr().out)
    assert len(report["calls_per_second"]) == 3 * len(sandbox.SOURCES)
    assert all(speed["median"] > 0 for speed in report["calls_per_second"].values())
    assert set(report["cpu_ms_per_call"]) == {f"warm pool: {name}" for name in sandbox.SOURCES}
    assert {name.partition(" /")[0] for name in report["ratios"]} == {"warm pool"}


def test_a_wrong_grade_is_no_measurement():
    with pytest.raises(ValueError, match="side: a grade is wrong"):
        sandbox.calls_per_second("side", lambda calls: [0.5] * calls, 2)
