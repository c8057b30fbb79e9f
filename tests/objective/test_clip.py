"""The clipped surrogate: values and gradients worked by hand."""

from __future__ import annotations

import pytest
import torch

from graft.objective.clip import clipped_policy_loss, truncated_importance_weight


# The old log-probability is 0, so the ratio is the number given; clip_low 0.2, clip_high 0.28.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 1.0, -1.0, -1.0, False),  # on policy: plain policy gradient
        (1.5, 1.0, -1.28, 0.0, True),  # risen past the ceiling: no reason to push further
        (1.25, 1.0, -1.25, -1.25, False),  # clip-higher: still inside
        (1.5, -1.0, 1.5, 1.5, False),  # risen, but it was bad: full push back
        (0.5, -1.0, 0.8, 0.0, True),  # fallen past the floor: enough
        (0.5, 1.0, -0.5, -0.5, False),  # fallen, but it was good: full push up
        (2.0, 0.0, 0.0, 0.0, False),  # nothing to learn
    ],
)
def test_loss_and_gradient_by_hand(ratio, advantage, loss, gradient, clipped):
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    out = clipped_policy_loss(
        logprob,
        torch.zeros(1, dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        clip_low=0.2,
        clip_high=0.28,
    )
    out.per_token.sum().backward()
    assert out.per_token.item() == pytest.approx(loss)
    assert logprob.grad is not None
    assert logprob.grad.item() == pytest.approx(gradient)
    assert out.was_clipped.item() is clipped


def test_the_importance_weight_is_capped_and_has_no_gradient():
    old = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    weight = truncated_importance_weight(old, torch.zeros(3), cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, 2.0, 0.36787944])
    assert not weight.requires_grad
