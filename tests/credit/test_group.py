"""Group-relative advantages: hand-worked values and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.credit.group import (
    group_mean,
    group_relative_advantages,
    group_std,
    leave_one_out_advantages,
    process_advantages,
    without_signal,
)


def test_two_groups_by_hand():
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    # group 0: mean 1/2, variance (4 · 1/4) / 3 = 1/3; group 1: mean 4, variance (1 + 1) / 1 = 2
    assert group_mean(scores, groups).tolist() == [0.5] * 4 + [4.0] * 2
    torch.testing.assert_close(
        group_std(scores, groups), torch.tensor([3**-0.5] * 4 + [2**0.5] * 2, dtype=torch.float64)
    )
    a, b = 0.5 / (3**-0.5 + 1e-4), 1 / (2**0.5 + 1e-4)
    torch.testing.assert_close(
        group_relative_advantages(scores, groups, scale="group_std"),
        torch.tensor([a, -a, -a, a, -b, b], dtype=torch.float64),
    )
    assert group_relative_advantages(scores, groups, scale="none").tolist() == [
        0.5,
        -0.5,
        -0.5,
        0.5,
        -1.0,
        1.0,
    ]
    # all six: mean 10/6, squares 2 · 1 + 9 + 25 = 36, variance (36 - 100/6) / 5
    whole = ((36 - 100 / 6) / 5) ** 0.5
    torch.testing.assert_close(
        group_relative_advantages(scores, groups, scale="batch_std"),
        torch.tensor([0.5, -0.5, -0.5, 0.5, -1.0, 1.0], dtype=torch.float64) / (whole + 1e-4),
    )


def test_equal_scores_have_no_signal_even_where_their_mean_is_rounded():
    scores = torch.tensor([0.1] * 3 + [0.7], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1])
    assert (
        scores[:3] - group_mean(scores, groups)[:3]
    ).abs().max() > 0  # what a test of the deviation would meet
    assert without_signal(scores, groups).all()
    for scale in ("group_std", "batch_std", "none"):
        assert group_relative_advantages(scores, groups, scale=scale).tolist() == [0.0] * 4


scores_and_groups = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.integers(0, 3)), min_size=1, max_size=20
).map(lambda pairs: (torch.tensor([s for s, _ in pairs]).double(), _number([g for _, g in pairs])))


def _number(groups: list[int]) -> torch.Tensor:
    order = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    return torch.tensor([order[g] for g in groups])


@given(scores_and_groups, st.sampled_from(["group_std", "batch_std", "none"]))
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift(case, scale):
    scores, groups = case
    advantages = group_relative_advantages(scores, groups, scale=scale)
    assert torch.isfinite(advantages).all()
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, advantages)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-6, rtol=0)
    shifted = group_relative_advantages(scores + 8, groups, scale=scale)
    torch.testing.assert_close(shifted, advantages, atol=1e-6, rtol=1e-6)


def test_no_samples_at_all():
    empty = torch.zeros(0, dtype=torch.float64)
    none = torch.zeros(0, dtype=torch.int64)
    assert group_relative_advantages(empty, none, scale="group_std").shape == (0,)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="group_std"):
        group_relative_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), scale="std")


def test_leave_one_out_by_hand():
    scores = torch.tensor([1.0, 0.0, 5.0, 3.0, 5.0, 8.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    # 1 - 5/2, 0 - 6/2, 5 - 1/2; 3 - 5, 5 - 3; a group of one
    assert leave_one_out_advantages(scores, groups).tolist() == [-1.5, -3.0, 4.5, -2.0, 2.0, 0.0]


@given(scores_and_groups, st.sampled_from([torch.float32, torch.float64]))
def test_leave_one_out_against_the_mean_of_the_others_written_out(case, dtype):
    scores, groups = case
    expected = []
    for i, (score, group) in enumerate(zip(scores.tolist(), groups.tolist(), strict=True)):
        others = [s for j, s in enumerate(scores.tolist()) if j != i and groups[j] == group]
        expected.append(score - sum(others) / len(others) if others else 0.0)
    got = leave_one_out_advantages(scores.to(dtype), groups)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)


def test_leave_one_out_of_equal_scores_is_exactly_nothing():
    tenths = torch.tensor([0.1] * 3, dtype=torch.float64)
    assert leave_one_out_advantages(tenths, torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


def test_process_supervision_by_hand():
    rewards = torch.tensor([1.0, 3.0, 0.0, 0.0, 7.0, 7.0], dtype=torch.float64)
    samples = torch.tensor([0, 0, 1, 1, 2, 2])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    # group 0: mean 1, squares 0 + 4 + 1 + 1 over 3: deviation 2^½; normalised 0, 2, -1, -1; sums 2, 2, -2, -1
    expected = torch.tensor([2.0, 2, -2, -1, 0, 0], dtype=torch.float64)
    got = process_advantages(rewards, samples, groups, scale="group_std")
    torch.testing.assert_close(got, expected / (2**0.5 + 1e-4))
    assert process_advantages(rewards, samples, groups, scale="none").tolist() == expected.tolist()


@given(
    st.lists(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=4), min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_process_supervision_against_the_papers_sum(steps, dtype):
    rewards = torch.tensor([r for sample in steps for r in sample], dtype=dtype)
    samples = torch.tensor([i for i, sample in enumerate(steps) for _ in sample])
    got = process_advantages(rewards, samples, torch.zeros_like(samples), scale="none")
    mean = sum(map(sum, steps)) / len(rewards)
    expected = [sum(r - mean for r in sample[k:]) for sample in steps for k in range(len(sample))]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-5)


def test_with_one_step_a_sample_process_supervision_is_outcome_supervision():
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    got = process_advantages(scores, torch.arange(6), groups, scale="group_std")
    assert got.tolist() == group_relative_advantages(scores, groups, scale="group_std").tolist()
