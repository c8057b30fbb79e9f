"""Reductions: weights by hand, and sums that no cutting changes."""

from __future__ import annotations

import pytest
import torch

from graft.objective.reduce import sample_mean_weights, token_mean_weights, weighted_sum


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
