"""The running baseline: batches by hand, and that no score enters its own baseline."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.credit.running_mean import RunningMean, running_mean_advantages


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_three_batches_by_hand():
    first = running_mean_advantages(doubles(1, 0, 5), RunningMean(), decay=1.0)
    assert first.advantages.tolist() == [-1.5, -3, 4.5]  # from the means of the others: 2.5, 3, 0.5
    assert first.carried == RunningMean(2, 3)
    second = running_mean_advantages(doubles(4), first.carried, decay=1.0)
    assert second.advantages.tolist() == [2]
    assert second.carried == RunningMean(2.5, 4)  # 1 + 0 + 5 + 4 over 4
    third = running_mean_advantages(doubles(0, 1), second.carried, decay=0.5)
    assert third.advantages.tolist() == [-2.5, -1.5]
    assert third.carried == RunningMean(1.5, 4)  # (0.5 · 4 · 2.5 + 1) / (0.5 · 4 + 2)


def test_with_decay_zero_the_baseline_is_the_last_batch():
    carried = running_mean_advantages(doubles(7, 9), RunningMean(100.0, 50.0), decay=0.0).carried
    assert carried == RunningMean(8, 2)


def test_a_first_batch_of_one_learns_nothing_and_an_empty_batch_changes_nothing():
    assert running_mean_advantages(doubles(3), RunningMean(), decay=1.0).advantages.tolist() == [0]
    carried = RunningMean(2.0, 5.0)
    assert running_mean_advantages(doubles(), carried, decay=0.5).carried == carried


scores = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6)


@given(
    st.lists(scores, min_size=1, max_size=4), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64])
)
def test_against_all_scores_with_their_weights_written_out(batches, decay, dtype):
    carried = RunningMean()
    weights, past = [], []
    for batch in batches:
        got, carried = running_mean_advantages(torch.tensor(batch, dtype=dtype), carried, decay=decay)
        assert got.dtype == dtype
        if past:
            mean = sum(w * x for w, x in zip(weights, past, strict=True)) / sum(weights)
            expected = [x - mean for x in batch]
        else:
            expected = [x - (sum(batch) - x) / (len(batch) - 1) if len(batch) > 1 else 0 for x in batch]
        torch.testing.assert_close(got.double(), doubles(*expected), atol=1e-5, rtol=1e-5)
        weights = [w * decay for w in weights] + [1.0] * len(batch)
        past += batch
    assert carried.weight == pytest.approx(sum(weights))


@given(st.lists(scores, min_size=1, max_size=4), st.floats(-100, 100, width=32))
def test_a_shift_of_all_scores_changes_no_advantage(batches, shift):
    plain = moved = RunningMean()
    for batch in batches:
        expected, plain = running_mean_advantages(doubles(*batch), plain, decay=0.9)
        got, moved = running_mean_advantages(doubles(*batch) + shift, moved, decay=0.9)
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)
