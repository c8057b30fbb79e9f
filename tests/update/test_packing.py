"""Packing: every span once, every trained token predicted from the right place, whatever the budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, StopReason
from graft.update.packing import MicroBatch, Span, pack
from graft.update.prefixes import MergedPrefixes
from tests.trees import random_credit, random_deep_tree, random_group, random_prompt


def visible(batch: MicroBatch, row: int) -> list[int]:
    """Tokens that a row's token sees, itself last, by the definition of a span."""
    seen = []
    for span in batch.spans:
        if span.end <= row < span.subtree_end:
            seen += range(span.start, span.end)
        elif span.start <= row < span.end:
            seen += range(span.start, row + 1)
    return [int(batch.tokens[i]) for i in seen]


def test_a_group_of_two_by_hand():
    rng = np.random.default_rng(0)
    tree = random_group(rng, samples=2)  # completions of 1 and n tokens
    one, other = tree.leaves()
    prompt, n = len(tree.nodes[ROOT]), len(tree.nodes[other])
    [batch] = pack([tree], [random_credit(tree, rng)], token_budget=100)

    # The single token is only predicted, never read; of the other the last is not read.
    assert len(batch.tokens) == prompt + n - 1
    assert batch.spans == (Span(0, prompt + n - 1, prompt + n - 1),)  # no branch among the tokens read
    assert batch.positions.tolist() == list(range(prompt + n - 1))
    assert batch.predictors.tolist() == [prompt - 1, prompt - 1, *range(prompt, prompt + n - 1)]
    assert batch.targets.tolist() == [*tree.nodes[one].tokens, *tree.nodes[other].tokens]


@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.2, 1), st.sampled_from([5, 300]))
def test_every_trained_token_is_predicted_once_from_its_own_path(seed, budget, share, vocabulary):
    rng = np.random.default_rng(seed)
    trees = [
        random_deep_tree(rng, row=i, nodes=int(rng.integers(2, 12)), vocabulary=vocabulary) for i in range(3)
    ]
    credits = [random_credit(tree, rng, share=share) for tree in trees]

    batches = pack(trees, credits, token_budget=budget)

    found: dict[tuple[int, int], int] = {}
    for batch in batches:
        for where in batch.slices:
            tree, credit = trees[where.tree], credits[where.tree]
            path = np.concatenate([tree.nodes[i].tokens for i in tree.path(where.node)]).tolist()
            own = len(tree.nodes[where.node])
            assert where.end - where.start == own
            for offset in range(own):
                place = where.start + offset
                prediction = int(batch.predictions[place])
                row = int(batch.predictors[prediction])
                position = len(path) - own + offset
                assert visible(batch, row) == path[:position]
                assert int(batch.targets[prediction]) == path[position]
                assert int(batch.positions[row]) == position - 1
            assert batch.weights[where.start : where.end].tolist() == credit.weights[where.node].tolist()
            assert np.array_equal(
                batch.advantages[where.start : where.end].numpy(), credit.advantages[where.node]
            )
            found[where.tree, where.node] = found.get((where.tree, where.node), 0) + 1
    assert found == {(t, n): 1 for t, credit in enumerate(credits) for n in credit.weights}


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_micro_batches_stay_within_the_budget_unless_a_path_is_longer(seed, budget):
    rng = np.random.default_rng(seed)
    trees = [random_deep_tree(rng, row=i) for i in range(3)]
    for batch in pack(trees, [random_credit(t, rng) for t in trees], token_budget=budget):
        tips = {(w.tree, w.node) for w in batch.slices}
        assert len(batch.tokens) <= budget or len({t for t, _ in tips}) == 1


def test_trees_without_credit_cost_nothing():
    rng = np.random.default_rng(0)
    trees = [random_group(rng, row=i) for i in range(3)]
    none = Credit({}, {})
    credits = [none, random_credit(trees[1], rng), none]
    [batch] = pack(trees, credits, token_budget=1000)
    assert {w.tree for w in batch.slices} == {1}
    assert len(batch.tokens) < sum(len(n) for n in trees[1].nodes)
    assert pack(trees, [none] * 3, token_budget=10) == []


@pytest.mark.parametrize("vocabulary", [5, 300])
def test_one_micro_batch_computes_every_beginning_once(vocabulary):
    rng = np.random.default_rng(3)
    tree = random_deep_tree(rng, nodes=12, vocabulary=vocabulary)
    [batch] = pack([tree], [random_credit(tree, rng)], token_budget=1000)
    paths = [
        np.concatenate([tree.nodes[i].tokens for i in tree.path(leaf)]).tolist() for leaf in tree.leaves()
    ]
    beginnings = {tuple(path[:end]) for path in paths for end in range(1, len(path))}
    assert len(batch.tokens) == len(beginnings)
    prompt = len(tree.nodes[ROOT])
    predicted = {tuple(path[:end]) for path in paths for end in range(prompt + 1, len(path) + 1)}
    assert len(batch.targets) == len(predicted)


def test_equal_beginnings_by_hand():
    """Two completions that part at their second token, and one of them twice."""
    tree = Tree(random_prompt(np.random.default_rng(0), length=2))
    group = tree.new_group()
    for tokens in ([7, 8, 9], [7, 5, 6, 4], [7, 8, 9]):
        tree.add(ROOT, tokens, group=group, kind=Kind.COMPLETION, stop=StopReason.EOS)
    weights = {leaf: np.ones(len(tree.nodes[leaf])) for leaf in tree.leaves()}
    advantages = {leaf: np.full(len(tree.nodes[leaf]), float(leaf)) for leaf in tree.leaves()}
    [batch] = pack([tree], [Credit(advantages, weights)], token_budget=100)
    assert batch.tokens.tolist() == [*tree.nodes[ROOT].tokens, 7, 8, 5, 6]
    assert batch.spans == (Span(0, 3, 6), Span(3, 4, 4), Span(4, 6, 6))
    assert batch.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert batch.targets.tolist() == [7, 8, 9, 5, 6, 4]
    assert batch.predictors.tolist() == [1, 2, 3, 2, 4, 5]
    assert batch.predictions.tolist() == [0, 1, 2, 0, 3, 4, 5, 0, 1, 2]
    assert batch.advantages.tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


@given(st.integers(0, 10**6), st.integers(4, 6))
def test_the_length_grows_as_foretold(seed, vocabulary):
    rng = np.random.default_rng(seed)
    tree = random_deep_tree(rng, nodes=10, vocabulary=vocabulary)
    prefixes = MergedPrefixes(tree)
    for leaf in tree.leaves():
        path = tree.path(leaf)
        before, growth = prefixes.length, prefixes.growth(path)
        prefixes.add(path)
        assert prefixes.length == before + growth == len(prefixes.row().places)
        assert prefixes.growth(path) == 0


@pytest.mark.parametrize("name", ["tokens", "positions", "predictors", "targets", "predictions"])
def test_indices_are_int64(name):
    rng = np.random.default_rng(0)
    tree = random_group(rng)
    [batch] = pack([tree], [random_credit(tree, rng)], token_budget=1000)
    assert getattr(batch, name).dtype == torch.int64
