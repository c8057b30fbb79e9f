"""Reductions: weights by hand, and sums that no cutting changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.objective.reduce import (
    constant_weights,
    sample_mean_weights,
    segment_sum_weights,
    token_mean_weights,
    tree_weights,
    weighted_sum,
)


def test_weights_by_hand():
    lengths = torch.tensor([1, 2, 4])
    assert sample_mean_weights(lengths, samples_in_step=3).tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 12])
    assert sample_mean_weights(lengths, samples_in_step=6).tolist() == pytest.approx([1 / 6, 1 / 12, 1 / 24])
    assert token_mean_weights(lengths, tokens_in_step=7).tolist() == pytest.approx([1 / 7] * 3)


def test_two_samples_by_hand():
    losses = torch.tensor([3.0, 1.0, 5.0], dtype=torch.float64)  # one sample of one token, one of two
    weights = torch.repeat_interleave(
        sample_mean_weights(torch.tensor([1, 2]), samples_in_step=2), torch.tensor([1, 2])
    )
    assert weighted_sum(losses, weights).item() == pytest.approx((3 + (1 + 5) / 2) / 2)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_cutting_the_step_into_micro_batches_changes_nothing(pieces):
    torch.manual_seed(0)
    losses, weights = torch.rand(2, 12, dtype=torch.float64)
    total = sum(
        weighted_sum(a, b).item() for a, b in zip(losses.chunk(pieces), weights.chunk(pieces), strict=True)
    )
    assert total == pytest.approx((losses * weights).sum().item(), abs=1e-12)


def test_the_constant_denominator_by_hand():
    got = constant_weights(torch.tensor([1, 2, 4]), samples_in_step=5, max_new_tokens=8)
    assert got.tolist() == [1 / 40] * 3


def test_the_sum_over_segments_by_hand():
    """Two completions, of segments of 1 and 4 tokens and of 2: (3 + 5 + 7) / 2."""
    lengths = torch.tensor([1, 4, 2])
    weights = segment_sum_weights(lengths, completions_in_step=2)
    assert weights.tolist() == [1 / 2, 1 / 8, 1 / 4]
    losses = torch.tensor([3.0, 5.0, 7.0], dtype=torch.float64).repeat_interleave(lengths)
    assert weighted_sum(losses, weights.repeat_interleave(lengths)).item() == 7.5


def test_the_tree_by_hand():
    """Prompt 0: two nodes at depth 1, three at depth 2. Prompt 1: one node. Weights of a node's tokens together."""
    lengths = torch.tensor([2, 1, 4, 1, 3, 5])
    prompts = torch.tensor([0, 0, 0, 0, 0, 1])
    depths = torch.tensor([1, 1, 2, 2, 2, 1])
    got = tree_weights(lengths, prompts, depths, prompts_in_step=2)
    assert (got * lengths).tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6, 1 / 2])
    # a third prompt without any node counts too
    more = tree_weights(lengths, prompts, depths, prompts_in_step=3)
    torch.testing.assert_close(more * 3, got * 2)


nodes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2), st.integers(1, 3)), max_size=14)


@given(nodes)
def test_the_tree_against_the_sum_written_out(nodes):
    losses = [float(i + 1) for i in range(len(nodes))]
    expected = 0.0
    for prompt in range(3):
        for depth in (1, 2, 3):
            level = [loss for loss, (_, p, d) in zip(losses, nodes, strict=True) if (p, d) == (prompt, depth)]
            expected += sum(level) / len(level) / 3 if level else 0
    lengths, prompts, depths = (
        torch.tensor([node[i] for node in nodes], dtype=torch.int64) for i in range(3)
    )
    weights = tree_weights(lengths, prompts, depths, prompts_in_step=3)
    per_token = torch.tensor(losses, dtype=torch.float64).repeat_interleave(lengths)
    got = weighted_sum(per_token, weights.repeat_interleave(lengths))
    assert got.item() == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(1, 50), min_size=4, max_size=4), min_size=1, max_size=6))
def test_a_tree_of_depth_one_is_reduced_as_grpo_to_the_bit(groups):
    lengths = torch.tensor(groups).flatten()
    prompts = torch.arange(len(groups)).repeat_interleave(4)
    tree = tree_weights(lengths, prompts, torch.ones_like(lengths), prompts_in_step=len(groups))
    assert tree.tolist() == sample_mean_weights(lengths, samples_in_step=len(lengths)).tolist()
