"""Whole runs on trees with groups at every prefix, and with values from rollouts: what is written of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graft
from graft.report.run_folder import RunFolder

ROWS = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(1, 4) for b in range(1, 5)]
CRITIC = """
def critic(chain):
    with open("asked", "a") as file:
        file.write("x")
    scores = [sum(map(ord, text)) % 2 for text in chain.thoughts]
    return {"thoughts": scores, "progress": [5.0] * len(scores)}
"""


def by_characters(completion: str, item: object) -> float:
    return float(sum(map(ord, completion)) % 3)


@pytest.fixture
def run(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`run(**settings of the algorithm)` trains for two steps: the lines of metrics and of trees."""
    monkeypatch.chdir(tmp_path)
    Path("critic.py").write_text(CRITIC)

    def train(**algorithm: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        chain = {"group_size": 3, "critic": {"type": "function", "function": "critic.py:critic"}}
        shape = {} if "shape" in algorithm else chain
        made = graft.train(
            str(tiny_model_folder),
            ROWS,
            by_characters,
            algorithm={"name": "grft", "segments": {"cutter": "tokens:3"}, **shape, **algorithm},
            sampling={"max_new_tokens": 10},
            training={"prompts_per_step": 4, "steps": 2},
            quiet=True,
        )
        folder = RunFolder.open(made.path)
        metrics = [line for line in folder.read_metrics() if line["stage"] == "train"]
        return metrics, [line for line in folder.read_trees() if line["stage"] == "train"]

    return train


def sampled(trees: list[dict[str, Any]], step: int) -> int:
    return sum(len(node["tokens"]) for tree in trees if tree["step"] == step for node in tree["nodes"][1:])


def test_draws_that_were_thrown_away_count_as_generated(run):
    metrics, trees = run(max_draws=3)
    total = 0
    for line in metrics:
        assert line["groups_redrawn"] > 0
        assert line["tokens_discarded"] >= 3 * line["groups_redrawn"]
        assert line["tokens_sampled"] == sampled(trees, line["step"]) + line["tokens_discarded"]
        total += line["tokens_sampled"]
        assert line["generated_tokens"] == total


def test_without_further_draws_nothing_is_thrown_away(run):
    metrics, trees = run()
    for line in metrics:
        assert "groups_redrawn" not in line
        assert "tokens_discarded" not in line
        assert line["tokens_sampled"] == sampled(trees, line["step"])


@pytest.mark.parametrize("survivor", ["sample", "best"])
def test_the_survivors_of_a_chain_are_written_as_they_grew(run, survivor):
    _, trees = run(survivor=survivor, max_depth=3)
    for tree in trees:
        nodes, survivors = tree["nodes"], tree["survivors"]
        gone_on_from = sorted({node["parent"] for node in nodes[2:]} - {0})
        assert [nodes[node]["parent"] for node in survivors] == [0, *survivors[:-1]]
        assert survivors[:-1] == gone_on_from
        assert nodes[survivors[-1]]["group"] == max(node["group"] for node in nodes)


@pytest.mark.parametrize("settings", [{}, {"survivor": "best"}, {"max_draws": 2}])
def test_what_the_critic_is_asked_while_trees_grow_counts(run, settings):
    """A call for each question, those about groups that were thrown away included."""
    metrics, trees = run(max_depth=3, **settings)
    calls = sum(line["critic_calls"] for line in metrics)
    assert calls == len(Path("asked").read_text())
    paths = sum(len(tree["critiques"]) for tree in trees)
    assert calls > paths if settings else calls == paths


def test_outcomes_of_a_chain_in_whole_runs(run):
    """A thought's value is the share of its continuations that are solved, an end's is its grade; what was drawn for
    them counts as generated."""
    critic = {"type": "monte_carlo", "continuations": 3}
    metrics, trees = run(score="outcome", critic=critic, max_depth=3)
    for line in metrics:
        assert line["critic_tokens_sampled"] > 0
        assert line["tokens_sampled"] == sampled(trees, line["step"]) + line["critic_tokens_sampled"]
    assert any(line["gradient_norm"] > 0 for line in metrics)
    shares, ends = set(), 0
    for tree in trees:
        for node, numbers in tree["numbers"].items():
            if tree["nodes"][int(node)]["stop"] != "cut":
                assert numbers["value"] == tree["grades"][node]["score"]
                ends += 1
            elif node in tree["critiques"]:
                assert numbers["value"] == pytest.approx(tree["critiques"][node]["progress"][-1] / 10)
                shares.add(round(3 * numbers["value"], 6))
    assert ends > 5
    assert 1 < len(shares) <= 4
    assert shares <= {0, 1, 2, 3}


def test_of_a_tree_all_survive_and_none_is_written(run):
    _, trees = run(shape="tree", branching=(2, 2), score="outcome")
    assert all("survivors" not in tree for tree in trees)


@pytest.mark.parametrize("name", ["vineppo", "spo_chain", "spo_tree"])
def test_values_from_rollouts_in_whole_runs(tiny_model_folder, tmp_path, monkeypatch, name):
    """Values go on from state to state, and what the rollouts drew counts as generated."""
    monkeypatch.chdir(tmp_path)
    own = {"branching": (2, 3)} if name == "spo_tree" else {"critic": {"continuations": 3}, "group_size": 2}
    made = graft.train(
        str(tiny_model_folder),
        ROWS,
        lambda completion, item: float(len(completion) % 2),
        algorithm={"name": name, "segments": {"cutter": "tokens:3"}, "updates_per_batch": 2, **own},
        sampling={"max_new_tokens": 9},
        training={"prompts_per_step": 4, "steps": 2},
        quiet=True,
    )
    folder = RunFolder.open(made.path)
    metrics = [line for line in folder.read_metrics() if line["stage"] == "train"]
    trees = [line for line in folder.read_trees() if line["stage"] == "train"]
    for line in metrics:
        drawn = sampled(trees, line["step"]) + line.get("critic_tokens_sampled", 0)
        assert line["tokens_sampled"] == drawn
        assert (line.get("critic_tokens_sampled", 0) > 0) == (name != "spo_tree")
    assert any(line["gradient_norm"] > 0 for line in metrics)
    checked = 0
    for tree in trees:
        for node, numbers in tree["numbers"].items():
            assert numbers["A"] == pytest.approx(numbers["value"] - numbers["V"])
            parent = str(tree["nodes"][int(node)]["parent"])
            if parent in tree["numbers"]:
                assert numbers["V"] == pytest.approx(tree["numbers"][parent]["value"])
                checked += 1
    assert checked > 10
