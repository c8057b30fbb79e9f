"""What a dry run says a run will take, against hand-worked counts and against the run itself.

Sampling always takes the likeliest token, so that all samples of a prompt are equal and every completion is as long as
the limit; the learning rate is next to nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.assemble import assemble
from graft.config_file import check_config
from graft.phases import phases_of
from graft.report.run_folder import RunFolder
from graft.report.terminal import Terminal
from graft.runs import start_run
from graft.trial import estimate_run
from graft.trial_update import try_update
from tests.trees import random_group

LIMIT, PROMPTS, STEPS = 4, 3, 2
READ = LIMIT - 1
"""Tokens of a prompt's completions that the network reads: all are equal, and the last one predicts nothing."""

CHAINS = {"segments": {"cutter": "tokens:2"}}


@pytest.fixture
def task(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{a} + {b} =", "worked": "4"} for a in range(1, 5) for b in range(1, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "grader.py").write_text("def reward(completion, item):\n    return 0.5\n")

    def config(algorithm: dict[str, Any], **sections: Any):
        return check_config(
            {
                "run": str(tmp_path / "run"),
                "base": str(tmp_path),
                "model": {"name": str(tiny_model_folder)},
                "data": {"source": "rows.jsonl", "held_out": 3},
                "grader": {"type": "function", "function": "grader.py:reward"},
                "algorithm": algorithm,
                "sampling": {"top_k": 1, "max_new_tokens": LIMIT},
                "training": {"prompts_per_step": PROMPTS, "steps": STEPS},
                "optimizer": {"learning_rate": 1e-12},
                **sections,
            },
            where="test",
        )

    return config


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    return [r for r in RunFolder.open(run).read_metrics() if r["stage"] == stage]


KL = {"coefficient": 0.1}


@pytest.mark.parametrize(
    ("algorithm", "drawn", "passes", "scorings"),
    [
        # drawn: tokens of one prompt; scorings: passes over a batch without gradient
        ({"name": "reinforce", "group_size": 2}, 2 * LIMIT, 1, 0),
        ({"name": "grpo", "group_size": 4, "kl": {**KL, "estimator": "exact"}}, 4 * LIMIT, 1, 1),
        ({"name": "grpo", "group_size": 4, "kl": {**KL, "anchor": "rollout"}}, 4 * LIMIT, 1, 1),
        (
            {"name": "ppo", "group_size": 2, "kl": KL, "updates_per_batch": 2, "minibatches": 3},
            2 * LIMIT,
            2,
            2,  # the policy's log-probabilities and values, and the anchor's
        ),
        (
            {
                "name": "ppo",
                "value": {"trunk": "separate", "update": "after_policy", "warmup_steps": 1},
                "updates_per_batch": 3,
            },
            LIMIT,
            3,
            1,
        ),
        # two continuations from the prompt; the only thought reaches the limit, and both samples have the same states
        (
            {
                "name": "rft",
                "group_size": 2,
                "critic": {"type": "monte_carlo", "continuations": 2},
                "segments": {"cutter": f"tokens:{LIMIT}"},
            },
            2 * LIMIT + 2 * LIMIT,
            1,
            2,
        ),
        # two candidates of two tokens, then two that go on to the end
        (
            {"name": "grft", "group_size": 2, "max_depth": 2, "kl": KL, **CHAINS},
            2 * 2 + 2 * 2,
            1,
            1,
        ),
        # two candidates that reach the limit, and two continuations from the prompt
        (
            {
                "name": "grft",
                "group_size": 2,
                "max_depth": 2,
                "kl": KL,
                "segments": {"cutter": f"tokens:{LIMIT}"},
                "score": "outcome",
                "critic": {"type": "monte_carlo", "continuations": 2},
            },
            2 * LIMIT + 2 * LIMIT,
            1,
            1,
        ),
    ],
)
def test_the_counts_are_those_of_the_run(task, algorithm, drawn, passes, scorings):
    config = task(algorithm)
    said = estimate_run(config)
    assert not Path(config.run).exists()
    prompt = said.facts.prompt_tokens_mean
    assert prompt == said.facts.prompt_tokens_longest
    batch = PROMPTS * (prompt + READ)
    assert said.tokens_sampled_training == STEPS * PROMPTS * drawn
    assert said.tokens_trained == pytest.approx(STEPS * passes * batch)
    assert said.tokens_scored == pytest.approx(STEPS * scorings * batch)
    run = _run(config)
    steps = records(run, "train")
    assert sum(step["tokens_sampled"] for step in steps) == said.tokens_sampled_training
    assert passes * sum(step["tokens_computed"] for step in steps) == pytest.approx(said.tokens_trained)


def _run(config) -> Path:
    return start_run(config, terminal=Terminal()).path


def test_supervised_training_and_its_validation(task):
    config = task({"name": "sft", "worked": "key:worked"}, evaluation={"every": 1})
    said = estimate_run(config)
    [step, _] = records(_run(config), "train")
    assert said.tokens_trained == pytest.approx(STEPS * step["tokens_computed"])
    assert said.tokens_sampled_training == 0
    parts = {item.name: item.times for item in said.items}
    measured = records(Path(config.run), "evaluation")
    assert parts["training: validation loss"] == sum("validation_loss" in r for r in measured) == 3
    assert parts["measuring before"] == parts["measuring during training"] == parts["measuring after"] == 1


def test_a_warm_start_is_made_before_its_followers_are_tried(task):
    """The likeliest completions end after "4" then, and not at the limit."""
    config = task(
        {"name": "reinforce", "group_size": 2},
        warm_start={
            "worked": "key:worked",
            "steps": 40,
            "rows_per_step": 3,
            "optimizer": {"learning_rate": 0.02},
        },
    )
    said = estimate_run(config)
    steps = records(_run(config), "train")
    drawn = sum(step["tokens_sampled"] for step in steps)
    assert said.tokens_sampled_training == drawn < STEPS * PROMPTS * 2 * LIMIT
    before = said.tokens_sampled_measuring - 2 * 3 * drawn / (STEPS * PROMPTS * 2)
    assert before == pytest.approx(3 * LIMIT)
    assert (
        "the model is the one after 40 of 40 steps of the warm start, made now in memory" in said.assumptions
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "grpo", "group_size": 4},
        {"name": "process_grpo", "group_size": 4, **CHAINS},
        {"name": "grft", "group_size": 2, "max_depth": 2, **CHAINS},
    ],
)
def test_groups_without_signal_stay_out_of_the_update(task, algorithm):
    """All scores are equal: of 3 trees none trains, of 5 one is expected to."""
    said = estimate_run(task(algorithm))
    batch = PROMPTS * (said.facts.prompt_tokens_mean + READ)
    assert said.tokens_trained == pytest.approx(STEPS * batch / 5)
    assert any("20 % of these go through the update" in line for line in said.assumptions)


def test_some_candidates_train(task):
    """Thoughts have scores that differ, and ends the same grade. The model's completions of two of the prompts are cut
    behind two tokens: these train, and the network reads one of them."""
    Path("critic.py").write_text(
        "import itertools\ncounter = itertools.count()\n"
        "def critic(chain):\n"
        "    scores = [next(counter) % 10 for _ in chain.thoughts]\n"
        '    return {"thoughts": scores, "progress": scores}\n'
    )
    critic = {"type": "function", "function": "critic.py:critic"}
    said = estimate_run(task({"name": "grft", "group_size": 2, "max_depth": 2, "critic": critic, **CHAINS}))
    prompt = said.facts.prompt_tokens_mean
    share = (2 * (prompt + 1) / (prompt + READ) + 1) / 5
    assert said.tokens_trained == pytest.approx(STEPS * PROMPTS * (prompt + READ) * share)


def test_dynamic_sampling(task):
    """No group has signal: 1 of 5 is expected to, and the run draws all its rounds."""
    config = task(
        {"name": "dapo", "group_size": 2, "max_sampling_rounds": 2, "overlong": {"buffer_share": 0}}
    )
    said = estimate_run(config)
    # 3 prompts, of which 0.6 have signal; then 2.4 / 0.2
    assert said.tokens_sampled_training == STEPS * (3 + 12) * 2 * LIMIT
    assert any("a step draws 15 prompts in 2 rounds" in line for line in said.assumptions)


def test_a_missing_score_is_no_signal(task):
    """Of each group of two one cannot be graded: the other has nobody to be compared with, as in the run."""
    Path("grader.py").write_text(
        "graded = []\ndef reward(completion, item):\n"
        "    graded.append(item)\n    return float('nan') if len(graded) % 2 else 0.5\n"
    )
    config = task(
        {"name": "dapo", "group_size": 2, "max_sampling_rounds": 2, "overlong": {"buffer_share": 0}},
        grading={"max_failure_rate": 1.0},
    )
    assert estimate_run(config).tokens_sampled_training == STEPS * (3 + 12) * 2 * LIMIT


ASKS_A_JUDGE = {
    "type": "score_model",
    "model": "strict",
    "range": [0, 1],
    "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
}


@pytest.mark.parametrize(
    "settings",
    [
        {"survivor": "best", "critic": {"type": "judge", "model": "strict"}},
        {"max_draws": 3, "critic": {"type": "judge", "model": "strict"}},
        {"survivor": "best", "critic": {"type": "grader", "grader": ASKS_A_JUDGE}},
    ],
)
def test_a_judge_is_not_asked(task, settings):
    config = task(
        {"name": "grft", "shape": "chain", **settings, **CHAINS, "max_depth": 2},
        grading={"judge": {"base_url": "http://127.0.0.1:9", "api_key_env": "", "retries": 0}},
    )
    said = estimate_run(config)
    assert any("the critic's judge was not asked" in line for line in said.assumptions)
    assert "training: critic" not in {item.name for item in said.items}


def test_memory_knows_the_value_model_and_the_anchor(task):
    """A copy of the model for the anchor, one with its two moments and gradients for the value's own trunk."""
    plain = estimate_run(task({"name": "reinforce"}))
    trees = [random_group(np.random.default_rng(0), row=i) for i in range(2)]
    found = {}
    for name, algorithm in {
        "reinforce": {"name": "reinforce"},
        "ppo": {"name": "ppo", "kl": KL, "value": {"trunk": "separate"}},
        "initial": {"name": "grpo", "kl": KL},
        "rollout": {"name": "grpo", "kl": {**KL, "anchor": "rollout"}},
    }.items():
        config = task(algorithm)
        [phase] = phases_of(config, training_rows=9)
        found[name] = try_update(assemble(config), phase, trees)
    policy = 4 * plain.facts.parameters
    assert found["reinforce"].trained == policy
    assert found["reinforce"].copies == found["rollout"].copies == 0
    assert found["initial"].copies == policy
    head = 4 * (32 + 1)
    trunk = found["ppo"].trained - policy - head
    assert 0 < trunk <= policy
    assert found["ppo"].copies == policy + trunk + head
    assert found["ppo"].checkpoint == 3 * (policy + trunk + head)
