"""Group-relative advantages: hand-worked values and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.credit.group import group_mean, group_relative_advantages, group_std, without_signal


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
