"""Packing: every span once, every trained token predicted from the right place, whatever the budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.tree import ROOT
from graft.types import Credit
from graft.update.packing import MicroBatch, Span, pack
from tests.trees import random_credit, random_deep_tree, random_group


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
    assert batch.spans == (Span(0, prompt, prompt + n - 1), Span(prompt, prompt + n - 1, prompt + n - 1))
    assert batch.positions.tolist() == list(range(prompt + n - 1))
    assert batch.predictors.tolist() == [prompt - 1, prompt - 1, *range(prompt, prompt + n - 1)]
    assert batch.targets.tolist() == [*tree.nodes[one].tokens, *tree.nodes[other].tokens]


@given(st.integers(0, 10**6), st.integers(1, 60), st.floats(0.2, 1))
def test_every_trained_token_is_predicted_once_from_its_own_path(seed, budget, share):
    rng = np.random.default_rng(seed)
    trees = [random_deep_tree(rng, row=i, nodes=int(rng.integers(2, 12))) for i in range(3)]
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
                row = int(batch.predictors[place])
                position = len(path) - own + offset
                assert visible(batch, row) == path[:position]
                assert int(batch.targets[place]) == path[position]
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


def test_one_micro_batch_computes_every_span_once():
    rng = np.random.default_rng(3)
    tree = random_deep_tree(rng, nodes=12)
    [batch] = pack([tree], [random_credit(tree, rng)], token_budget=1000)
    leaves = len(tree.leaves())
    assert len(batch.tokens) == sum(len(n) for n in tree.nodes) - leaves


@pytest.mark.parametrize("name", ["tokens", "positions", "predictors", "targets"])
def test_indices_are_int64(name):
    rng = np.random.default_rng(0)
    tree = random_group(rng)
    [batch] = pack([tree], [random_credit(tree, rng)], token_budget=1000)
    assert getattr(batch, name).dtype == torch.int64
