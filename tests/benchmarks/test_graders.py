"""The grader benchmark on a handful of calls: every side grades rightly. What it measures is not looked at."""

from __future__ import annotations

import json

import pytest

from benchmarks import graders
from tests.grading.sandbox.sandboxes import open_sandbox


def test_all_sides_grade_and_are_reported(capsys):
    open_sandbox().close()
    graders.main(
        [
            "--json",
            "--repeats",
            "1",
            "--seconds",
            "0.001",
            "--workers",
            "1",
            "--calls",
            "3",
            "--fresh-calls",
            "1",
        ],
    )
    report = json.loads(capsys.readouterr().out)
    assert set(report["samples_per_second"]) == set(graders.GRADERS)
    assert len(report["calls_per_second"]) == 3 * len(graders.SOURCES)
    counted = {name for name in report["calls_per_second"] if not name.startswith("fresh sandbox")}
    assert set(report["cpu_ms_per_call"]) == counted
    for figures in ("samples_per_second", "calls_per_second"):
        assert all(speed["median"] > 0 for speed in report[figures].values())
    assert all(name.startswith("warm pool against fresh") for name in report["ratios"])
    assert set(report["targets"]) == {"string_check", "fuzzy_match"}  # the third is for two workers


def test_a_wrong_grade_is_no_measurement():
    with pytest.raises(ValueError, match="side: a grade is wrong"):
        graders.calls_per_second(graders.Side("side", lambda calls: [0.5] * calls, 2))


@pytest.mark.parametrize(("speed", "met"), [(199.0, False), (200.0, True)])
def test_targets(speed, met):
    fast = {"median": 1e6}
    figures = {
        "samples_per_second": {"string_check": fast, "fuzzy_match": fast},
        "calls_per_second": {"warm pool: plain": {"median": speed}},
    }
    assert graders.targets_met(figures, workers=2)["warm pool: plain"] == {
        "at_least": 200,
        "measured": speed,
        "met": met,
    }
