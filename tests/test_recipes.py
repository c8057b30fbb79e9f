"""The recipes run: a few steps of each with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from graft.comparison.compare import entries_of
from graft.comparison.entrants import read_entrants
from graft.config_file import load_config
from graft.errors import ConfigError
from graft.graders import grader_spec, open_grader
from graft.report.run_folder import RunFolder
from graft.runs import start_run
from tests.grading.samples import Reply, Request, judged, sample, scripted_server

RECIPES = Path(__file__).parents[1] / "recipes"


def test_the_multi_grader_trains_and_reports_its_parts(tmp_path, tiny_model_folder):
    config = load_config(
        RECIPES / "multi_grader" / "config.toml",
        [
            f"run={tmp_path / 'run'}",
            f"model.name={tiny_model_folder}",
            "data.rows=20",
            "data.held_out=4",
            "training.steps=3",
            "training.prompts_per_step=2",
            "sampling.max_new_tokens=8",
        ],
    )
    run = start_run(config)
    records = RunFolder.open(run.path).read_metrics()
    steps = [record for record in records if record["stage"] == "train"]
    assert len(steps) == 3
    for record in steps:
        parts = [record[f"part_{name}_mean"] for name in ("right", "form", "near")]
        assert record["reward_mean"] == pytest.approx(0.8 * parts[0] + 0.1 * parts[1] + 0.1 * parts[2])
        assert record["grades_failed"] == 0
    assert any(record["part_near_mean"] > 0 for record in steps)
    assert all("held_out_part_near_mean" in record for record in records if record["stage"] == "evaluation")


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("3 + 4 = 7\nAnswer: 7", 0.95, 1.0), ("Answer: 8", 0.1, 0.2), ("7", 0.0, 0.11), ("", 0.0, 0.0)],
)
def test_what_the_multi_grader_pays(text, least, most):
    folder = RECIPES / "multi_grader"
    config = load_config(folder / "config.toml")
    assert config.grader is not None
    grader = open_grader(grader_spec(config.grader, folder), config.grading, base=folder)
    [grade] = grader([sample(text, answer="7")])
    assert grade.score is not None
    assert least <= grade.score <= most


WORKED_STEPS = RECIPES / "worked_steps"
SMALL = (
    *("data.rows=20", "data.held_out=4", "evaluation.rows=2", "warm_start.steps=1", "rollout.slots=12"),
    *("training.generated_tokens=900", "training.prompts_per_step=2", "sampling.max_new_tokens=16"),
)


@pytest.mark.parametrize("name", ["config", "grft_chain", "grft_tree"])
def test_worked_steps_trains(name, tmp_path, tiny_model_folder):
    overrides = [f"run={tmp_path / 'run'}", f"model.name={tiny_model_folder}", *SMALL]
    run = start_run(load_config(WORKED_STEPS / f"{name}.toml", overrides))
    records = RunFolder.open(run.path).read_metrics()
    steps = [record for record in records if record["stage"] == "train"]
    assert sum(record["tokens_sampled"] for record in steps) == run.summary["generated_tokens"] >= 900
    assert all(record["critic_failed"] == 0 for record in steps)


def test_worked_steps_differ_in_their_method_alone():
    configs = [
        load_config(WORKED_STEPS / f"{name}.toml").model_dump()
        for name in ("config", "grft_chain", "grft_tree")
    ]
    for config in configs:
        del config["run"], config["algorithm"]
    assert configs[0] == configs[1] == configs[2]


def test_the_comparison_that_worked_steps_names():
    """Its variants have the settings of the recipe's files."""
    [command] = re.findall(
        r"^graft compare .*?(?=^```)", (WORKED_STEPS / "README.md").read_text(), re.M | re.S
    )
    words = shlex.split(command.replace("\\\n", " "))
    variants = [word for flag, word in pairwise(words) if flag == "--variant"]
    entrants = read_entrants(words[words.index("--algorithms") + 1], variants)
    entries = entries_of(WORKED_STEPS / "config.toml", entrants, seeds=1, tokens=None, out=Path("out"))
    by_label = {entry.label: entry.config.algorithm for entry in entries}
    assert list(by_label) == ["grpo", "ppo", "every_segment", "shared", "grft_chain", "grft_tree"]
    assert by_label["shared"] == load_config(WORKED_STEPS / "config.toml").algorithm
    for name in ("grft_chain", "grft_tree"):
        assert by_label[name] == load_config(WORKED_STEPS / f"{name}.toml").algorithm


def test_judge_rft_differs_in_its_critic_alone():
    ours, judged_by_model = (
        load_config(RECIPES / name / "config.toml").model_dump() for name in ("worked_steps", "judge_rft")
    )
    for config in (ours, judged_by_model):
        del config["run"], config["base"], config["grading"], config["algorithm"]["critic"]
    ours["warm_start"]["worked"] = f"../worked_steps/{ours['warm_start']['worked']}"
    assert judged_by_model == ours


def first_wrong(thoughts: int) -> int:
    """A judge that finds the second thought wrong where there is one."""
    return 2 if thoughts > 1 else 0


def test_a_judge_scores_the_thoughts_of_judge_rft(tmp_path, tiny_model_folder, monkeypatch):
    """The server says which thought is the first wrong one; scores, costs and the key have to be the run's."""
    monkeypatch.setenv("JUDGE_API_KEY", "sesame")

    def answer(request: Request) -> Reply:
        asked = json.loads(request.body["messages"][1]["content"])
        return judged({"reason": "seen", "earliest_error": first_wrong(len(asked["thoughts"]))})

    with scripted_server() as server:
        server.answer = answer
        config = load_config(
            RECIPES / "judge_rft" / "config.toml",
            [
                f"run={tmp_path / 'run'}",
                f"model.name={tiny_model_folder}",
                "data.rows=20",
                "data.held_out=4",
                "training.generated_tokens=400",
                "training.prompts_per_step=3",
                "algorithm.group_size=2",
                "algorithm.segments.cutter=tokens:8",
                "sampling.max_new_tokens=24",
                "warm_start.steps=2",
                f"grading.judge.models.judge.base_url={server.url}/v1",
                "grading.judge.cache=false",
            ],
        )
        run = start_run(config)
    folder = RunFolder.open(run.path)
    steps = [record for record in folder.read_metrics() if record["stage"] == "train"]
    assert len(steps) >= 3
    calls = sum(record["critic_calls"] for record in steps)
    assert len(server.requests) == calls > 10
    assert sum(record["critic_prompt_tokens"] for record in steps) == 11 * calls
    assert all(record["critic_failed"] == 0 for record in steps)
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer sesame"}
    assert {request.body["model"] for request in server.requests} == {"judge"}
    assert {request.body["temperature"] for request in server.requests} == {0}
    chains = 0
    for tree in folder.read_trees():
        if tree["stage"] == "train":
            for critique in tree["critiques"].values():
                thoughts = critique["thoughts"]
                assert thoughts == [10.0, 0.0, *[5.0] * len(thoughts)][: len(thoughts)]
                chains += len(thoughts) > 1
    assert chains > 5


def test_judge_rft_names_the_variable_of_its_key(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    config = load_config(
        RECIPES / "judge_rft" / "config.toml",
        [f"run={tmp_path / 'run'}", f"model.name={tiny_model_folder}", "data.rows=20", "data.held_out=4"],
    )
    with pytest.raises(ConfigError, match=r"environment variable JUDGE_API_KEY, which is not set"):
        start_run(config)
