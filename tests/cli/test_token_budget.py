"""Runs whose length is a number of generated tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graft.report.metrics import without_wall_clock
from graft.report.run_folder import RunFolder
from tests.cli.conftest import TROUBLE
from tests.tasks import write_task

BUDGET = 100


@pytest.fixture
def by_tokens(tmp_path, tiny_model_folder):
    """The task with a budget instead of steps."""
    return write_task(
        tmp_path,
        tiny_model_folder,
        code=TROUBLE,
        training={"steps": None, "generated_tokens": BUDGET},
        optimizer={"schedule": "linear", "final_fraction": 0.5},
        evaluation={"every_generated_tokens": 30},
    )


def records(folder, stage: str) -> list[dict[str, Any]]:
    return [r for r in RunFolder.open(folder).read_metrics() if r["stage"] == stage]


def test_the_step_that_reaches_the_budget_is_the_last(by_tokens, graft):
    summary = json.loads(graft("train", by_tokens / "config.toml", "--json").out)
    steps = records(by_tokens / "run", "train")
    drawn = [step["generated_tokens"] for step in steps]
    assert drawn[-2] < BUDGET <= drawn[-1] == summary["generated_tokens"]
    before = [0, *drawn[:-1]]
    assert [step["learning_rate"] for step in steps] == pytest.approx(
        [1e-2 * (1 - 0.5 * tokens / BUDGET) for tokens in before]
    )
    during = [
        r["generated_tokens"] for r in records(by_tokens / "run", "evaluation") if r["moment"] == "during"
    ]
    assert during == [
        now for former, now in zip(before, drawn, strict=True) if now // 30 > former // 30 and now < BUDGET
    ]
    assert during


def test_interrupted_and_resumed_it_is_the_same_run(by_tokens, graft):
    config = by_tokens / "config.toml"
    assert graft("train", config, "--set", f"run={by_tokens / 'undisturbed'}").code == 0
    stops = ("--set", "grader.function=grader.py:stops_in_the_middle")
    (by_tokens / "grader.py").write_text(
        (by_tokens / "grader.py").read_text()
        + "\n\nCALLS = []\n\n\ndef stops_in_the_middle(completion, item):\n"
        "    CALLS.append(1)\n"
        "    if len(CALLS) == 16 and not FIRST_CALL.exists():\n"
        "        FIRST_CALL.touch()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return reward(completion, item)\n"
    )
    assert graft("train", config, *stops).code == 143
    halfway = records(by_tokens / "run", "train")
    assert 1 <= len(halfway) < len(records(by_tokens / "undisturbed", "train"))
    assert graft("resume", by_tokens / "run").code == 0
    for stage in ("train", "evaluation"):
        one, other = (
            [without_wall_clock(r) for r in records(by_tokens / name, stage)]
            for name in ("undisturbed", "run")
        )
        assert one == other


def test_a_dry_run_counts_the_steps(by_tokens, graft):
    said = json.loads(graft("train", by_tokens / "config.toml", "--dry-run", "--json").out)
    assert said["tokens_sampled_training"] >= BUDGET
    assert said["steps"]["training"] >= BUDGET / (4 * 6)  # 4 completions of at most 6 tokens a step
