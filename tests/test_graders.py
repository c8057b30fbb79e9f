"""From settings to a grader: files, keys, servers, rows that lack something; and a run that asks a judge."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.config import Grading
from graft.config_file import check_config, load_config, load_grading
from graft.data.rows import Row, read_rows
from graft.errors import ConfigError, DataError, GraderError
from graft.graders import grader_spec, open_grader, open_judges, refuse_rows
from graft.grading.check import parse_grader
from graft.grading.sandbox import SandboxLimits
from graft.report.run_folder import RunFolder
from tests.grading.samples import Scripted, judged, sample, verdict
from tests.grading.sandbox.sandboxes import open_sandbox

CHECK = {
    "type": "string_check",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
SCORE = {
    "type": "score_model",
    "model": "gpt-4o-2024-08-06",
    "input": [{"role": "user", "content": "{{item.answer}} or {{sample.output_text}}?"}],
}
MINIMAL = {"run": "r", "model": {"name": "m"}, "data": {"source": "rows.jsonl"}, "training": {"steps": 1}}


def rows(*items: dict[str, Any]) -> list[Row]:
    return read_rows(
        [{"prompt": f"q{n}", **item} for n, item in enumerate(items)],
        options={},
        limit=None,
        seed=0,
        base=Path(),
    )


def test_a_grader_in_the_settings_is_written_out_and_read_back(tmp_path):
    config = check_config({**MINIMAL, "grader": CHECK}, where="here")
    assert config.grader == {**CHECK, "name": "string_check"}
    assert grader_spec(config.grader or {}, tmp_path) == parse_grader(CHECK)


def test_a_grader_in_a_toml_file_with_members(tmp_path):
    (tmp_path / "config.toml").write_text(
        """
run = "r"
model.name = "m"
data.source = "rows.jsonl"
training.steps = 1
[grader]
type = "multi"
calculate_output = "0.8 * right + 0.2 * form"
[grader.graders.right]
type = "number"
[grader.graders.form]
type = "regex"
pattern = '^Answer: '
"""
    )
    config = load_config(tmp_path / "config.toml")
    assert config.grader is not None
    spec = grader_spec(config.grader, tmp_path)
    grader = open_grader(spec, config.grading, base=tmp_path)
    assert [g.score for g in grader([sample("Answer: 4", answer=4), sample("4", answer=4)])] == [1.0, 0.8]


def test_a_grader_in_a_file_of_its_own(tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(CHECK))
    config = check_config({**MINIMAL, "grader": {"file": "g.json"}}, where="here")
    assert config.grader is not None
    assert grader_spec(config.grader, tmp_path) == parse_grader(CHECK)
    (tmp_path / "g.json").write_text(json.dumps({**CHECK, "operation": "is"}, indent=1))
    with pytest.raises(GraderError, match=r"g\.json:5: \$\.operation: got \"is\""):
        grader_spec(config.grader, tmp_path)
    with pytest.raises(GraderError, match=r"none\.json"):
        grader_spec({"file": "none.json"}, tmp_path)


JSON_WANTED = {"type": "json_object"}


@pytest.mark.parametrize("whole", [True, False])
def test_a_grader_in_the_body_of_a_job(tmp_path, whole):
    """With the form of completions that stands beside it, unless the settings have one of their own."""
    reinforcement = {"grader": CHECK, "response_format": JSON_WANTED, "hyperparameters": {"n_epochs": 2}}
    method = {"type": "reinforcement", "reinforcement": reinforcement}
    body = {"model": "o4-mini", "training_file": "file-1", "method": method} if whole else reinforcement
    (tmp_path / "job.json").write_text(json.dumps(body))
    settings = {**MINIMAL, "base": str(tmp_path), "grader": {"file": "job.json"}}
    config = check_config(settings, where="here")
    assert grader_spec(config.grader or {}, tmp_path) == parse_grader(CHECK)
    assert config.grading.response_format == JSON_WANTED
    assert check_config({**settings, "grading": {"concurrency": 2}}, where="here").grading == Grading(
        concurrency=2, response_format=JSON_WANTED
    )
    text = {"type": "text"}
    config = check_config({**settings, "grading": {"response_format": text}}, where="here")
    assert config.grading == Grading(response_format=text)


def test_problems_of_a_grader_in_a_job_have_their_place(tmp_path):
    body: dict[str, Any] = {"method": {"reinforcement": {"grader": {**CHECK, "operation": "is"}}}}
    (tmp_path / "job.json").write_text(json.dumps(body, indent=1))
    with pytest.raises(
        GraderError, match=r'job\.json:8: \$\.method\.reinforcement\.grader\.operation: got "is"'
    ):
        grader_spec({"file": "job.json"}, tmp_path)
    del body["method"]["reinforcement"]["grader"]
    (tmp_path / "job.json").write_text(json.dumps(body, indent=1))
    with pytest.raises(
        GraderError, match=r"job\.json:3: .*reinforcement\.grader: got nothing; wants a grader"
    ):
        grader_spec({"file": "job.json"}, tmp_path)


def test_all_problems_of_a_grader_are_lines_of_the_settings_error():
    with pytest.raises(ConfigError) as refused:
        check_config({**MINIMAL, "grader": {**CHECK, "operation": "is", "input": "{{x}}"}}, where="here.toml")
    lines = str(refused.value).splitlines()
    assert [line.partition(": got")[0] for line in lines] == [
        "here.toml: grader.input",
        "here.toml: grader.operation",
    ]


# -- judges ---------------------------------------------------------------------------------------------------


def grading(**judge: Any) -> Grading:
    return Grading.model_validate({"judge": {"cache": False, "retries": 0, **judge}})


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server.replies = [judged(verdict(0.5))]
    settings = grading(base_url=f"{server.url}/v1", api_key_env="MY_KEY")
    grader = open_grader(parse_grader(SCORE), settings, base=Path())
    [grade] = grader([sample("four", answer="4")])
    grader.close()
    assert grade.score == 0.5
    assert server.requests[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_is_not_set_is_missed_by_name(monkeypatch, value):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    message = r"'gpt-4o-2024-08-06' at https://api\.openai\.com/v1.*OPENAI_API_KEY, which is not set"
    with pytest.raises(ConfigError, match=message):
        open_grader(parse_grader(SCORE), Grading(), base=Path())
    open_grader(parse_grader(CHECK), Grading(), base=Path()).close()  # who asks nobody needs none


def test_a_local_server_in_the_place_of_openais_model_needs_no_key(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.replies = [judged(verdict(1))]
    local = {"base_url": f"{server.url}/v1", "model": "qwen3", "api_key_env": ""}
    settings = grading(models={"gpt-4o-2024-08-06": local})
    grader = open_grader(parse_grader(SCORE), settings, base=Path())
    assert grader([sample("4", answer="4")])[0].score == 1.0
    grader.close()
    assert server.requests[0].body["model"] == "qwen3"


def test_a_slip_in_a_judges_name_sends_nothing_to_another_server(server, monkeypatch):
    """Of a grader or of a critic: both open their judges here. Whoever means both names, names both."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    local = {"base_url": f"{server.url}/v1", "api_key_env": ""}
    with pytest.raises(ConfigError, match=r"'jugde', which .* Did you mean 'judge'\?"):
        open_judges(grading(models={"judge": local}).judge, ["jugde"])
    for models in ({"judge": local, "jugde": {}}, {"gpt-4o-mini": local}, {}):
        asked = "gpt-4o" if "gpt-4o-mini" in models else "jugde"
        open_judges(grading(models=models).judge, [asked]).close()
    assert not server.requests


def test_the_cache_lies_beside_the_models(server, monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    server.replies = [judged(verdict(1)), judged(verdict(0))]
    settings = grading(base_url=server.url, api_key_env="", cache=True)
    for _ in range(2):
        grader = open_grader(parse_grader(SCORE), settings, base=Path())
        assert grader([sample("4", answer="4")])[0].score == 1.0
        grader.close()
    assert len(list((tmp_path / "cache" / "judges").rglob("*.json"))) == 1


def test_settings_of_grading_alone():
    assert (
        load_grading(["grading.judge.base_url=http://x/v1", "grading.failures=zero"]).judge.base_url
        == "http://x/v1"
    )
    with pytest.raises(ConfigError, match=r"grading\.judge\.bas_url: unknown setting.*'base_url'"):
        load_grading(["grading.judge.bas_url=x"])
    with pytest.raises(ConfigError, match=r"only grading\.\* can be set"):
        load_grading(["training.steps=3"])


# -- rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "items", "problem"),
    [
        (
            CHECK,
            [{"answer": "4"}, {"anwser": "4"}],
            r"rows\[1\]: \$\.answer: got nothing.*Did you mean 'anwser'\?",
        ),
        ({**CHECK, "reference": "{{item.a[1].b}}"}, [{"a": [1]}], r"rows\[0\]: \$\.a\[1\]\.b: got nothing"),
        (SCORE, [{}], r"\$\.answer: got nothing"),
        ({"type": "number"}, [{"answer": "four"}], r"\$\.answer: got \"four\"; wants a number"),
        ({"type": "number", "key": "sum"}, [{"answer": 4}], r"\$\.sum: got nothing.*Set grader\.key"),
        (
            {**CHECK, "input": "{{sample.output_json.x}}"},
            [{"answer": "4"}],
            r"response_format: got nothing; wants a resp",
        ),
        (
            {**CHECK, "input": "{{sample.output_tools[0].id}}"},
            [{"answer": "4"}],
            r"output_tools.*calls no tools",
        ),
        (
            CHECK,
            [{"answer": "4", "response_format": {"type": "json_schema"}}],
            r"\$\.response_format\.json_schema: got",
        ),
        (
            {"type": "multi", "graders": {"a": CHECK, "b": {"type": "number"}}, "calculate_output": "a+b"},
            [{"answer": "x"}],
            r"\$\.answer: got \"x\"; wants a number",
        ),
    ],
)
def test_rows_that_lack_what_the_grader_reads_are_refused_at_start(spec, items, problem):
    with pytest.raises(DataError, match=problem):
        refuse_rows(parse_grader(spec), rows(*items))


def test_rows_that_have_it_are_taken():
    refuse_rows(parse_grader(CHECK), rows({"answer": None}))
    reads = parse_grader({**CHECK, "input": "{{sample.output_json.x}}"})
    refuse_rows(reads, rows({"answer": "4"}), {"type": "json_object"})
    refuse_rows(reads, rows({"answer": "4", "response_format": {"type": "json_object"}}))


def test_many_problems_are_counted():
    with pytest.raises(DataError, match="and 5 more problems"):
        refuse_rows(parse_grader(CHECK), rows(*({"n": n} for n in range(15))))


# -- runs -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "algorithm": {"group_size": 2},
    "sampling": {"max_new_tokens": 6},
    "training": {"prompts_per_step": 2, "steps": 2},
}
ROWS = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(8)]
JUDGED = {
    "type": "multi",
    "graders": {"exact": CHECK, "judge": SCORE},
    "calculate_output": "0.5*exact + 0.5*judge",
}


def judging(server: Scripted) -> dict[str, Any]:
    return {"judge": {"base_url": f"{server.url}/v1", "api_key_env": "", "cache": False, "retries": 0}}


def test_a_run_asks_its_judge_side_by_side(server, tiny_model_folder, tmp_path):
    """The server answers nobody before four ask at once: all samples of a step."""
    together = threading.Barrier(4, timeout=60)

    def answer(request):
        together.wait()
        return judged(verdict(len(request.body["messages"][0]["content"]) % 3 / 2))

    server.answer = answer
    run = graft.train(
        str(tiny_model_folder), ROWS, JUDGED, run=str(tmp_path / "run"), grading=judging(server), **SMALL
    )
    assert len(server.requests) == 8  # two steps of two groups of two
    records = [r for r in RunFolder.open(run.path).read_metrics() if r["stage"] == "train"]
    assert [r["judge_prompt_tokens"] for r in records] == [44, 44]
    assert all(r["reward_mean"] == pytest.approx(r["part_judge_mean"] / 2) for r in records)
    assert all(r["part_exact_mean"] == 0 for r in records)
    config = load_config(run.path / "config.toml")
    assert config.grader is not None
    assert config.grader["graders"]["judge"]["range"] == [0.0, 1.0]


def test_a_judge_that_is_down_stops_the_run_and_says_where(tiny_model_folder, tmp_path, server):
    server.answer = lambda request: judged("no JSON")
    with pytest.raises(GraderError, match=r"4 of 4 samples could not be graded .*judge-1 answered no JSON"):
        graft.train(
            str(tiny_model_folder), ROWS, JUDGED, run=str(tmp_path / "run"), grading=judging(server), **SMALL
        )


def test_where_failures_score_0_the_run_goes_on_and_counts_them(tiny_model_folder, tmp_path, server):
    server.answer = lambda request: judged("no JSON")
    settings = {**judging(server), "failures": "zero", "max_failure_rate": 1.0}
    run = graft.train(
        str(tiny_model_folder), ROWS, JUDGED, run=str(tmp_path / "run"), grading=settings, **SMALL
    )
    records = [r for r in RunFolder.open(run.path).read_metrics() if r["stage"] == "train"]
    assert [(r["grades_failed"], r["reward_mean"]) for r in records] == [(4, 0.0), (4, 0.0)]
    assert all(r["grading_model_grader_parse_error_count"] == 4 for r in records)


def test_rows_are_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(DataError, match=r"the grader cannot judge these rows"):
        graft.train("no-such-model", [{"prompt": "x"}], CHECK, run=str(tmp_path / "run"), **SMALL)


def test_limits_of_the_sandbox_are_settings_with_its_defaults():
    defaults = Grading().sandbox
    assert {field.name: getattr(defaults, field.name) for field in fields(SandboxLimits)} == asdict(
        SandboxLimits()
    )


@pytest.mark.parametrize(
    ("setting", "body", "said"),
    [
        ("wall_s=0.5", "while True: pass", "wall_s = 0.5 s"),
        ("memory_mb=64", "return len(bytearray(100 << 20))", "MemoryError"),
        ("output_kb=1", "print('x' * 2000)", "output_kb = 1 KiB"),
        ("processes=2", "import os; return [os.fork() or os._exit(0) for _ in range(9)]", "BlockingIOError"),
        ("disk_mb=1", "open('a', 'wb').write(bytes(2 << 20))", "OSError"),
        ("cpu_s=1", "while True: pass", "cpu_s = 1 s"),
    ],
)
def test_limits_of_the_sandbox_hold(setting, body, said):
    open_sandbox().close()
    grading = load_grading([f"grading.sandbox.{setting}"])
    spec = parse_grader({"type": "python", "source": f"def grade(sample, item):\n    {body}\n"})
    grader = open_grader(spec, grading, base=Path())
    [grade] = grader([sample()])
    grader.close()
    assert grade.score is None
    assert said in grade.reason


@pytest.mark.parametrize("setting", ["wall_s=0", "memory_mb=0", "processes=-1", "output_kb=1.5", "cpu_s=nan"])
def test_limits_that_mean_nothing_are_refused(setting):
    with pytest.raises(ConfigError, match=f"grading.sandbox.{setting.partition('=')[0]}"):
        load_grading([f"grading.sandbox.{setting}"])
