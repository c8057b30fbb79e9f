"""Clipped policy losses, one value per token. Weights and means are in `reduce.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graft.objective.ratio import policy_ratio


class ClippedLoss(NamedTuple):
    """A policy loss with a clip in it."""

    per_token: Float[Tensor, " tokens"]
    """To be minimised."""

    was_clipped: Bool[Tensor, " tokens"]
    """True where the clip stopped the gradient; under CISPO, where it made it smaller."""


def clipped_policy_loss(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    *,
    clip_low: float,
    clip_high: float,
    ratio: str = "token",
    nodes: Int[Tensor, " tokens"] | None = None,
    dual_clip: float | None = None,
) -> ClippedLoss:
    """PPO's clipped surrogate; with `clip_high > clip_low` it is DAPO's clip-higher.

        loss = max(-A ρ, -A clip(ρ, 1 - clip_low, 1 + clip_high))

    and with a dual clip, where A < 0, min(loss, -A dual_clip).

    Args:
        logprobs: log-probability of each sampled token now, nats. Carries the gradient.
        old_logprobs: the same from the trainer's own forward pass with the weights that sampled. No gradient.
        advantages: positive means "more of this". No gradient. The same for all tokens of a node where the ratio is
            the node's.
        clip_low: how far the ratio may fall below 1 before the gradient stops, e.g. 0.2.
        clip_high: how far it may rise above 1, e.g. 0.2 (PPO) or 0.28 (DAPO).
        ratio: ρ of the `token`, the `segment` or the `segment_mean`: see `ratio.py`.
        nodes: the node of each token, for the last two.
        dual_clip: c, above 1 + clip_high, e.g. 3: a bad token's loss and push stop growing at ρ = c. None is off.

    Sources: PPO, arXiv:1707.06347, eq. 7; DAPO, arXiv:2503.14476, section 3.1; dual clip, arXiv:1912.09729, eq. 5;
    GSPO, arXiv:2507.18071, eq. 5; the deck, "Overview of PPO" and "Chain-of-Thought RFT Objective". TRL's `delta` is
    the dual clip; its mean over a micro-batch's own tokens or samples is not ours: see `reduce.py`.
    """
    rho = policy_ratio(logprobs, old_logprobs, nodes, ratio=ratio)
    free = -advantages * rho
    clipped = -advantages * rho.clamp(1 - clip_low, 1 + clip_high)
    loss, was_clipped = torch.maximum(free, clipped), clipped > free
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        was_clipped = was_clipped | (loss > ceiling)
        loss = torch.minimum(loss, ceiling)
    return ClippedLoss(loss, was_clipped.detach())


def cispo_loss(
    logprobs: Float[Tensor, " tokens"],
    old_logprobs: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    *,
    cap: float,
) -> ClippedLoss:
    """-min(ρ, cap) A log π_θ, no gradient through min(ρ, cap): REINFORCE with a truncated importance weight.

    Unlike under a clipped surrogate every token keeps a gradient, rare ones too.

    Args:
        logprobs: log-probability of each sampled token now, nats. Carries the gradient.
        old_logprobs: the same with the weights that sampled. No gradient.
        advantages: positive means "more of this". No gradient.
        cap: upper bound of the weight, e.g. 5 (ScaleRL, arXiv:2510.13786); there is no lower one.

    Source: CISPO of MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.
    """
    rho = policy_ratio(logprobs, old_logprobs, ratio="token").detach()
    return ClippedLoss(-rho.clamp(max=cap) * advantages * logprobs, rho > cap)


def truncated_importance_weight(
    old_logprobs: Float[Tensor, " tokens"], engine_logprobs: Float[Tensor, " tokens"], *, cap: float
) -> Float[Tensor, " tokens"]:
    """min(exp(old - engine), cap): corrects for an engine that samples from slightly other probabilities.

    Multiplies the policy loss; carries no gradient. Source: truncated importance sampling, Ionides 2008.
    """
    return torch.exp(old_logprobs - engine_logprobs).clamp(max=cap).detach()
