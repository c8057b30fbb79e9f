"""Clipped policy losses, one value per token. Weights and means are in `reduce.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ClippedLoss(NamedTuple):
    """What `clipped_policy_loss` returns."""

    per_token: Float[Tensor, " tokens"]
    """To be minimised."""

    was_clipped: Bool[Tensor, " tokens"]
    """True where the clip stopped the gradient."""


def clipped_policy_loss(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    *,
    clip_low: float,
    clip_high: float,
) -> ClippedLoss:
    """PPO's clipped surrogate; with `clip_high > clip_low` it is DAPO's clip-higher.

        ρ    = exp(logprobs - old_logprobs)
        loss = max(-A ρ, -A clip(ρ, 1 - clip_low, 1 + clip_high))

    Args:
        logprobs: log-probability of each sampled token now, nats. Carries the gradient.
        old_logprobs: the same from the trainer's own forward pass with the weights that sampled. No gradient.
        advantages: positive means "more of this". No gradient.
        clip_low: how far the ratio may fall below 1 before the gradient stops, e.g. 0.2.
        clip_high: how far it may rise above 1, e.g. 0.2 (PPO) or 0.28 (DAPO).

    Sources: PPO, arXiv:1707.06347, eq. 7; DAPO, arXiv:2503.14476, section 3.1; the deck, "Overview of PPO".
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    return ClippedLoss(torch.maximum(free, clipped), (clipped > free).detach())


def truncated_importance_weight(
    old_logprobs: Float[Tensor, " tokens"], engine_logprobs: Float[Tensor, " tokens"], *, cap: float
) -> Float[Tensor, " tokens"]:
    """min(exp(old - engine), cap): corrects for an engine that samples from slightly other probabilities.

    Multiplies the policy loss; carries no gradient. Source: truncated importance sampling, Ionides 2008.
    """
    return torch.exp(old_logprobs - engine_logprobs).clamp(max=cap).detach()
