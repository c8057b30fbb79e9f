"""`graft doctor`: what it prints, its exit codes, what it refuses."""

from __future__ import annotations

import json

import pytest

from graft.report.doctor.diagnosis import CHECKS
from tests.report.doctor.runs import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", groups=2, metrics=lambda step: {"ratio_max": 20.0}).path


def test_the_table_says_verdict_value_threshold_reason_and_what_to_change(run, graft):
    result = graft("doctor", run, "--topic", "topic")
    assert (result.code, result.err) == (0, "")
    lines = " ".join(" ".join(line.strip("│┃ ").split()) for line in result.out.splitlines())
    for words in (
        "│ bad",
        "Ratio drift",
        "20 in a late step",
        "look from 2, bad from 10.",
        "hangs on single tokens",
    ):
        assert words in result.out.replace("\n", " ") or words in lines
    assert "→ Lower `optimizer.learning_rate`" in result.out
    assert "Not measured" in result.out
    assert "Topics" in result.out
    assert result.out.splitlines()[-1].endswith("not measured")
    assert ", 1 bad, " in result.out.splitlines()[-1]


def test_strict_fails_on_a_bad_verdict_alone(run, tmp_path, graft):
    assert graft("doctor", run, "--strict").code == 9
    healthy = write_run(tmp_path / "healthy", groups=2).path
    assert graft("doctor", healthy, "--strict").code == 0


def test_json_holds_every_check(run, graft):
    result = graft("doctor", run, "--json", "--strict")
    assert result.code == 9
    said = json.loads(result.out)
    assert [finding["name"] for finding in said["findings"]] == [check.name for check in CHECKS]
    assert sum(said["verdicts"].values()) == len(CHECKS)
    assert said["verdicts"]["bad"] == 1
    assert all(finding["reason"] for finding in said["findings"])


def test_rows_from_elsewhere_come_from_graft_eval(run, tmp_path, graft):
    other = tmp_path / "other.json"
    other.write_text('{"rows": 4000, "pass_at": {"1": {"mean": 0.1, "low": 0.09, "high": 0.11}}}')
    said = json.loads(graft("doctor", run, "--json", "--out-of-distribution", other).out)
    [found] = [f for f in said["findings"] if f["name"] == "out_of_distribution"]
    assert (found["verdict"], found["text"]) == ("bad", "held-out 60.0 %, other rows 10.0 % of 4000")


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", '{"rows": 3, "pass_at": {}}'])
def test_another_file_is_refused(run, tmp_path, graft, text):
    (tmp_path / "other.json").write_text(text)
    result = graft("doctor", run, "--out-of-distribution", tmp_path / "other.json")
    assert result.code == 3
    assert "want what `graft eval --json` prints" in result.err


def test_what_is_no_run_is_refused_and_damaged_lines_are_named(run, tmp_path, graft):
    result = graft("doctor", tmp_path)
    assert result.code == 3
    assert "not a run folder" in result.err
    with (run / "trees.jsonl").open("a") as file:
        file.write('{"step": 1}\n')
    result = graft("doctor", run)
    assert result.code == 0
    assert "left out: trees.jsonl, line 41: stage: field required" in result.err
