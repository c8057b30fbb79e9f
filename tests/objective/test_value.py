"""The value loss by hand, its gradient, and explained variance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft.objective.value import explained_variance, value_loss


def doubles(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# V_rollout is 1 and c_v is 0.5
@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [
        (1.25, 3.0, 1.53125, -1.75, False),  # near: plain, ½ 1.75²
        (2.5, 3.0, 1.125, 0.0, True),  # moved far towards its target: V_clip = 1.5, ½ 1.5²; enough
        (2.5, 0.0, 3.125, 2.5, False),  # moved far away from its target: ½ 2.5², pulled back
        (0.0, -1.0, 1.125, 0.0, True),  # as the second, downwards: V_clip = 0.5
        (3.0, 3.0, 1.125, 0.0, True),  # right, but too far for one step
    ],
)
def test_loss_and_gradient_by_hand(value, target, loss, gradient, clipped):
    values = doubles(value).requires_grad_()
    got = value_loss(values, doubles(1), doubles(target), clip=0.5)
    got.per_state.sum().backward()
    assert values.grad is not None
    assert got.per_state.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert got.was_clipped.item() is clipped


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_without_a_clip_it_is_half_the_square(clip):
    values = doubles(2.5, 0).requires_grad_()
    got = value_loss(values, doubles(1, 1), doubles(3, 4), clip=clip)
    assert got.per_state.tolist() == [0.125, 8]
    assert got.was_clipped.tolist() == [False, False]
    got.per_state.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-0.5, -4]


state = st.floats(-4, 4, width=32)


@given(st.lists(st.tuples(state, state, state), max_size=8), st.sampled_from([0.0, 0.2, 1.0]))
def test_against_the_decks_formula_in_plain_python(states, clip):
    def slow(value, rollout, target):
        near = rollout + max(-clip, min(clip, value - rollout))
        plain = (value - target) ** 2
        return 0.5 * (max(plain, (near - target) ** 2) if clip > 0 else plain)

    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        columns = [torch.tensor([s[i] for s in states], dtype=dtype) for i in range(3)]
        got = value_loss(*columns, clip=clip).per_state
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), doubles(*(slow(*s) for s in states)), atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_gradient_against_finite_differences(clip):
    torch.manual_seed(0)
    values, rollout, targets = torch.randn(3, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, rollout, targets, clip=clip).per_state, (values.requires_grad_(),)
    )


def test_explained_variance_by_hand():
    targets = doubles(1, 2, 3)
    assert explained_variance(targets, targets) == pytest.approx(1)
    assert explained_variance(targets + 5, targets) == pytest.approx(1)  # an offset is no variance
    assert explained_variance(doubles(7, 7, 7), targets) == pytest.approx(0)
    assert explained_variance(-targets, targets) == pytest.approx(-3)  # Var(2Y) = 4 Var(Y)
    assert explained_variance(doubles(1, 1, 3), targets) == pytest.approx(1 - 1 / 3)  # left 0, 1, 0


def test_where_there_is_nothing_to_explain_it_is_none():
    assert explained_variance(doubles(1, 2), doubles(0.1, 0.1)) is None
    assert explained_variance(doubles(1), doubles(3)) is None
    assert explained_variance(doubles(), doubles()) is None
