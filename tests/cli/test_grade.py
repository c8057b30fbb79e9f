"""`graft grade`: OpenAI's `graders.run` on files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.grading.sandbox.sandboxes import open_sandbox
from tests.grading.test_response import FLAGS

GRADER = {
    "type": "multi",
    "name": "total",
    "graders": {
        "exact": {
            "type": "string_check",
            "name": "exact",
            "input": "{{sample.output_text}}",
            "reference": "{{item.answer}}",
            "operation": "eq",
        },
        "label": {
            "type": "string_check",
            "name": "label",
            "input": "{{sample.output_json.label}}",
            "reference": "{{item.answer}}",
            "operation": "eq",
        },
    },
    "calculate_output": "max(exact, 0.5*label)",
}
ROWS = [{"answer": "Paris"}, {"answer": "Rome"}, {"answr": "Madrid"}]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "g.json").write_text(json.dumps(GRADER))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "g.json", tmp_path / "rows.jsonl"


def completions(files: tuple[Path, Path], *lines: object) -> Path:
    path = files[0].parent / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_run_responses(graft, files):
    samples = completions(files, "Paris", '{"label": "Rome"}', "Madrid")
    result = graft("grade", *files, "--samples", samples, "--json")
    assert result.code == 0
    first, second, third = json.loads(result.out)
    assert first["metadata"].pop("execution_time") >= 0
    assert first == {
        "reward": 1.0,
        "metadata": {
            "name": "total",
            "type": "multi",
            # the completion is no JSON, so that the second grader's path leads nowhere
            "errors": {**FLAGS, "invalid_variable_error": True},
            "scores": {"exact": 1.0, "label": 0.0},
            "token_usage": None,
            "sampled_model_name": None,
        },
        "sub_rewards": {"exact": 1.0, "label": 0.0},
        "model_grader_token_usage_per_model": {},
    }
    assert (second["reward"], second["sub_rewards"]) == (0.5, {"exact": 0.0, "label": 1.0})
    assert second["metadata"]["errors"] == FLAGS
    assert third["reward"] == 0.0
    assert third["metadata"]["errors"]["invalid_variable_error"] is True


def test_the_body_of_a_job(graft, files, tmp_path):
    """Its response format comes along: the label must follow the schema."""
    schema = {"type": "object", "properties": {"label": {"enum": ["Rome"]}}}
    declared = {"type": "json_schema", "json_schema": {"name": "o", "strict": True, "schema": schema}}
    body = {
        "method": {"type": "reinforcement", "reinforcement": {"grader": GRADER, "response_format": declared}}
    }
    (tmp_path / "job.json").write_text(json.dumps(body))
    samples = completions(files, '{"label": "Paris"}', '{"label": "Rome"}')
    result = graft("grade", tmp_path / "job.json", files[1], "--samples", samples, "--json")
    assert result.code == 0
    first, second = json.loads(result.out)
    assert (first["reward"], second["reward"]) == (0.0, 0.5)
    assert first["metadata"]["errors"]["sample_parse_error"]


def test_the_table(graft, files):
    result = graft("grade", *files, "--samples", completions(files, "Paris", "x", "y"))
    assert result.code == 0
    header, *lines = result.out.splitlines()
    assert header.split() == ["row", "reward", "exact", "label", "flags", "completion", "reason"]
    assert lines[0].split()[:6] == ["0", "1", "1", "0", "invalid_variable_error", "Paris"]
    assert "3 samples, mean 0.3333, 1 could not be graded" in result.err


def test_the_table_shows_the_end_of_a_traceback(graft, files, tmp_path):
    open_sandbox().close()
    grader = tmp_path / "python.json"
    grader.write_text(
        json.dumps({"type": "python", "source": "def grade(sample, item):\n    return 1 / 0\n"})
    )
    (tmp_path / "one.jsonl").write_text('{"output_text": "half \\ud800"}\n')
    result = graft("grade", grader, tmp_path / "one.jsonl")
    [_, line] = result.out.splitlines()
    assert "  half ?  " in line
    assert line.endswith("  ZeroDivisionError: division by zero")


def test_several_samples_of_a_row(graft, files):
    samples = completions(files, {"output_text": "Rome", "row": 1}, {"output_text": "Oslo", "row": 1})
    rewards = [
        one["reward"] for one in json.loads(graft("grade", *files, "--samples", samples, "--json").out)
    ]
    assert rewards == [1.0, 0.0]


def test_completions_in_the_rows(graft, files, tmp_path):
    rows = tmp_path / "done.jsonl"
    rows.write_text('{"answer": "Paris", "output_text": "Paris"}\n{"answer": "Rome", "output_text": "x"}\n')
    assert [one["reward"] for one in json.loads(graft("grade", files[0], rows, "--json").out)] == [1.0, 0.0]


def test_a_function_and_a_settings_file(graft, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def reward(completion, item):\n    return len(completion)\n")
    samples = completions(files, "Paris", "x", "yy")
    result = graft("grade", "mine.py:reward", files[1], "--samples", samples, "--json")
    assert [one["reward"] for one in json.loads(result.out)] == [5.0, 1.0, 2.0]
    config = tmp_path / "c.toml"
    config.write_text(
        'run = "r"\nmodel.name = "m"\ndata.source = "rows.jsonl"\ntraining.steps = 1\n[grader]\nfile = "g.json"\n'
    )
    assert graft("grade", config, files[1], "--samples", samples).code == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([3], "samples.jsonl:1: got no text"),
        ([{"text": "x"}], "samples.jsonl:1: got no text"),
        (["a", "b", "c", "d"], "samples.jsonl:4: belongs to row 3; there are 3 rows"),
        ([{"output_text": "x", "row": -1}], "belongs to row -1"),
        ([], "no completions in it"),
    ],
)
def test_samples_that_cannot_be_used(graft, files, lines, message):
    result = graft("grade", *files, "--samples", completions(files, *lines))
    assert result.code == 3
    assert message in result.err


def test_what_is_missing(graft, files, tmp_path, monkeypatch):
    result = graft("grade", *files)
    assert result.code == 3
    assert "row 0 has no text output_text to grade" in result.err
    assert graft("grade", files[0], tmp_path / "none.jsonl").code == 3
    assert graft("grade", tmp_path / "none.json", files[1]).code == 5
    assert graft("grade", *files, "--set", "training.steps=1").code == 2
    judge = {"type": "score_model", "model": "m", "input": [{"role": "user", "content": "x"}]}
    (tmp_path / "judge.json").write_text(json.dumps(judge))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    result = graft("grade", tmp_path / "judge.json", files[1], "--samples", completions(files, "x"))
    assert result.code == 2
    assert "OPENAI_API_KEY, which is not set" in result.err
