"""Loss of the value function, one value per state, and how much of its targets it explains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ValueLoss(NamedTuple):
    """What `value_loss` returns."""

    per_state: Float[Tensor, " states"]
    """To be minimised."""

    was_clipped: Bool[Tensor, " states"]
    """True where the clip stopped the gradient."""


def value_loss(
    values: Float[Tensor, " states"],
    rollout_values: Float[Tensor, " states"],
    targets: Float[Tensor, " states"],
    *,
    clip: float,
) -> ValueLoss:
    """½ max((V_θ - Y)², (V_clip - Y)²) where clip > 0, else ½ (V_θ - Y)².

        V_clip = V_rollout + clip(V_θ - V_rollout, -clip, clip)

    Args:
        values: V_θ(s) now, in the rewards' unit. Carries the gradient.
        rollout_values: V(s) from the weights that sampled. No gradient.
        targets: Y of each state. No gradient. A state with several continuations stands here once for each.
        clip: c_v, how far V_θ may move away from V_rollout while that helps, in the rewards' unit: too small
            for the rewards' scale it stops the value function from learning. 0 and below is off.

    Source: the deck, "Chain-of-Thought RFT Objective".
    """
    free = (values - targets) ** 2 / 2
    if clip <= 0:
        return ValueLoss(free, torch.zeros_like(values, dtype=torch.bool))
    near = rollout_values + (values - rollout_values).clamp(-clip, clip)
    clipped = (near - targets) ** 2 / 2
    return ValueLoss(torch.maximum(free, clipped), (clipped > free).detach())


def explained_variance(values: Float[Tensor, " states"], targets: Float[Tensor, " states"]) -> float | None:
    """1 - Var(Y - V) / Var(Y): 1 for a perfect V, 0 for a constant, below 0 for worse than a constant.

    None where the targets have no variance to explain: they are all equal, or there are fewer than two.
    """
    if targets.numel() < 2 or bool(targets.min() == targets.max()):
        return None
    left, whole = (targets.double() - values.double()).var(), targets.double().var()
    return float(1 - left / whole)
