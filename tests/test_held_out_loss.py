"""The loss on held-out rows by hand and by a slow version, and when training ends for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graft
from graft.algorithm_settings import SFT
from graft.errors import ConfigError
from graft.held_out_loss import after_loss, having_worked, held_out_loss
from graft.tree import ROOT, Kind, Tree
from graft.update.policy import PolicyForward, Precision
from tests.trees import random_prompt
from tests.update.test_exactness import load

ROWS = [{"prompt": f"What is {n} + 1?", "worked": f"It is {n + 1}."} for n in range(12)]


def worked(*lengths: int) -> list[Tree]:
    rng = np.random.default_rng(0)
    trees = []
    for row, length in enumerate(lengths):
        tree = Tree(random_prompt(rng, row=row))
        tokens = rng.integers(3, 300, length).astype(np.int32)
        tree.add(ROOT, tokens, group=tree.new_group(), kind=Kind.COMPLETION, stop=None)
        trees.append(tree)
    return trees


def loss_of(model, trees, reduction="token_mean", temperature=1.0, budget=1000):
    forward = PolicyForward(model, Precision("exact", torch.device("cpu")))
    settings = SFT.model_validate({"worked": "key:w", "reduction": reduction})
    return held_out_loss(forward, trees, settings, temperature=temperature, microbatch_tokens=budget)


def test_a_model_that_knows_nothing(tiny_model_folder):
    """A head of zeros gives every token the same probability."""
    model = load(tiny_model_folder, torch.float64)
    with torch.no_grad():
        head = model.get_output_embeddings()
        assert head is not None
        head.weight.zero_()
    expected = math.log(model.config.vocab_size)
    for reduction in ("token_mean", "sample_mean"):
        assert loss_of(model, worked(3, 5, 1), reduction) == pytest.approx(expected, rel=1e-12)


def test_against_each_completion_by_itself(tiny_model_folder):
    model = load(tiny_model_folder, torch.float64)
    trees = worked(4, 1, 7)
    sums = []
    for tree in trees:
        path = torch.tensor([t for node in tree.nodes for t in node.tokens.tolist()])
        with torch.no_grad():
            logits = load(tiny_model_folder, torch.float64)(path[None]).logits[0, :-1] / 0.7
        own = len(tree.nodes[1])
        sums.append(float(torch.nn.functional.cross_entropy(logits[-own:], path[-own:], reduction="sum")))
    by_token, by_sample = sum(sums) / 12, (sums[0] / 4 + sums[1] + sums[2] / 7) / 3
    assert by_token != pytest.approx(by_sample, rel=1e-3)
    for budget in (1000, 16):
        assert loss_of(model, trees, "token_mean", 0.7, budget) == pytest.approx(by_token, rel=1e-6)
        assert loss_of(model, trees, "sample_mean", 0.7, budget) == pytest.approx(by_sample, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_waiting_by_hand():
    losses = [2.0, 1.5, 1.45, 1.39, math.nan, 1.2, 1.5]
    #         best  best  +1    best  +1       best +1     with a minimum improvement of 0.1
    watched, seen = None, []
    for loss in losses:
        watched = after_loss(watched, loss, minimum_improvement=0.1)
        seen.append((watched["best"], watched["waited"]))
    assert seen == [(2.0, 0), (1.5, 0), (1.5, 1), (1.39, 0), (1.39, 1), (1.2, 0), (1.2, 1)]
    assert after_loss({"best": 1.5, "waited": 0}, 1.5, minimum_improvement=0)["waited"] == 1


def test_rows_that_have_a_worked_completion():
    rng = np.random.default_rng(0)
    prompts = [random_prompt(rng, row=row) for row in range(2)]
    assert having_worked(prompts, "key:answer") == prompts
    assert having_worked(prompts, "key:worked") == []
    assert having_worked(prompts, "grader.py:worked") == prompts


@pytest.fixture
def train(tiny_model_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def run(rows=ROWS, **settings: Any):
        settings = {
            "run": str(tmp_path / "run"),
            "algorithm": {"name": "sft", "worked": "key:worked"},
            "data": {"held_out": 4},
            "training": {"steps": 8, "prompts_per_step": 4},
            "evaluation": {"every": 1},
            **settings,
        }
        done = graft.train(str(tiny_model_folder), rows, **settings)
        lines = (done.path / "metrics.jsonl").read_text().splitlines()
        return done, [json.loads(line) for line in lines], capfd.readouterr().err

    return run


def losses(records, stage="evaluation"):
    return [r["validation_loss"] for r in records if r["stage"] == stage and "validation_loss" in r]


def test_it_is_measured_at_every_evaluation(train):
    run, records, _ = train(training={"steps": 3, "prompts_per_step": 4}, optimizer={"learning_rate": 1e-3})
    measured = [(r["moment"], r["step"], r["validation_rows"]) for r in records if "moment" in r]
    assert measured == [("before", 0, 4), ("during", 1, 4), ("during", 2, 4), ("after", 3, 4)]
    found = losses(records)
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] > 1e-3
    assert "stopped_early" not in run.summary
    assert "validation loss" in (run.path / "report.html").read_text().lower()


def test_training_ends_when_the_loss_falls_no_longer(train):
    algorithm = {"name": "sft", "worked": "key:worked"}
    stopping = {"patience": 2, "minimum_improvement": 100.0}
    run, records, said = train(algorithm=algorithm | {"early_stopping": stopping})
    assert [r["step"] for r in records if r["stage"] == "train"] == [1, 2]
    assert [r["moment"] for r in records if "moment" in r] == ["before", "during", "during", "after"]
    found = losses(records)
    assert found[2] == found[3]  # the same weights
    assert run.summary["status"] == "finished"
    assert run.summary["stopped_early"] == (
        f"training ended early, after step 2: the validation loss is {found[2]:.4g} nats a token, and none of the last "
        f"2 measurements was lower than the {found[0]:.4g} before them by more than 100"
    )
    assert "training ended early" in said
    again = graft.resume(run.path, rows=ROWS)  # nothing is left to do
    assert again.summary["stopped_early"] == run.summary["stopped_early"]
    assert (run.path / "metrics.jsonl").read_text().splitlines() == [json.dumps(r) for r in records]


def test_a_warm_start_ends_early(train):
    run, records, _ = train(
        reward=lambda completion, item: float(len(completion) % 2),
        algorithm={"name": "grpo", "group_size": 2},
        training={"steps": 1, "prompts_per_step": 2},
        sampling={"max_new_tokens": 4},
        warm_start={
            "worked": "key:worked",
            "steps": 9,
            "rows_per_step": 4,
            "validate_every": 2,
            "early_stopping": {"patience": 2, "minimum_improvement": 100.0},
        },
    )
    warm = [r for r in records if r["stage"] == "warm_start"]
    assert [("validation_loss" in r) for r in warm] == [False, True, False, True]
    by_moment = {r["moment"]: r for r in records if "moment" in r}
    assert set(by_moment) == {"before", "after_warm_start", "after"}
    assert by_moment["after_warm_start"]["validation_loss"] == warm[-1]["validation_loss"]
    assert "validation_loss" not in by_moment["after"]
    assert run.summary["stopped_early"].startswith("warm start ended early, after step 4: ")
    assert sum(r["stage"] == "train" for r in records) == 1


def test_rows_without_a_worked_completion(train):
    bare = [{"prompt": row["prompt"]} for row in ROWS]
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare[:3]))
    data = {"held_out_source": "held_out.jsonl"}
    stopping = {"name": "sft", "worked": "key:worked", "early_stopping": {}}
    with pytest.raises(ConfigError, match=r"0 of 3 held-out rows have it.*algorithm\.early_stopping"):
        train(ROWS[3:], data=data, algorithm=stopping)
    rows = "".join(json.dumps(row) + "\n" for row in [*bare[:2], ROWS[2]])
    Path("held_out.jsonl").write_text(rows)
    _, records, said = train(ROWS[3:], data=data, training={"steps": 1})
    assert "1 of 3 held-out rows have it; the validation loss is that of these" in " ".join(said.split())
    assert {r["validation_rows"] for r in records if "moment" in r} == {1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evaluation": {}}, "algorithm.early_stopping needs evaluation.every"),
        ({"data": {}}, "early_stopping needs held-out rows"),
        (
            {"warm_start": {"worked": "key:worked", "steps": 1, "early_stopping": {}}},
            "warm_start.early_stopping needs warm_start.validate_every",
        ),
    ],
)
def test_what_cannot_stop_is_refused(train, settings, words):
    algorithm = {"name": "sft", "worked": "key:worked", "early_stopping": {}}
    with pytest.raises(ConfigError, match=words):
        train(algorithm=algorithm, **settings)
