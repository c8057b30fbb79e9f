"""Advantages relative to a group of samples drawn from one state. Pure tensors."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_EPSILON = 1e-4
"""Added to a standard deviation before dividing, as in TRL's GRPO."""


def group_mean(
    scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """The mean score of each sample's group, R̄ in the deck ("Introduction to GRPO").

    Args:
        scores: one finite score for each sample.
        groups: index of each sample's group, 0 to number of groups - 1.
    """
    number = int(groups.max()) + 1 if groups.numel() else 0
    count = torch.zeros(number, dtype=scores.dtype).index_add_(0, groups, torch.ones_like(scores))
    total = torch.zeros(number, dtype=scores.dtype).index_add_(0, groups, scores)
    return (total / count)[groups]


def group_std(
    scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """The standard deviation of each sample's group, with N - 1 in the variance; 0 for a group of one."""
    centred = scores - group_mean(scores, groups)
    number = int(groups.max()) + 1 if groups.numel() else 0
    count = torch.zeros(number, dtype=scores.dtype).index_add_(0, groups, torch.ones_like(scores))
    squares = torch.zeros(number, dtype=scores.dtype).index_add_(0, groups, centred**2)
    return (squares / (count - 1).clamp(min=1)).sqrt()[groups]


def without_signal(
    scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"]
) -> Bool[Tensor, " samples"]:
    """True for every sample of a group whose scores are all equal, a group of one included.

    Exact equality on the scores themselves: a standard deviation is off zero by rounding when equal scores
    such as 0.1 are averaged.
    """
    number = int(groups.max()) + 1 if groups.numel() else 0
    infinity = torch.full((number,), torch.inf, dtype=scores.dtype)
    lowest = infinity.scatter_reduce(0, groups, scores, "amin")
    highest = (-infinity).scatter_reduce(0, groups, scores, "amax")
    return (lowest == highest)[groups]


def group_relative_advantages(
    scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"], *, scale: str
) -> Float[Tensor, " samples"]:
    """A_i = (R_i - R̄) / (std + 1e-4), exactly 0 in a group whose scores are all equal.

    Args:
        scores: one finite score for each sample.
        groups: index of each sample's group.
        scale: `group_std` divides by the group's standard deviation, `batch_std` by that of all scores
            (both with N - 1), `none` does not divide (Dr. GRPO, arXiv:2503.20783).

    Sources: DeepSeekMath, arXiv:2402.03300, section 4.1.2; the deck, "Introduction to Group Relative Policy
    Optimization". The epsilon and N - 1 follow TRL.
    """
    centred = (scores - group_mean(scores, groups)).where(~without_signal(scores, groups), 0.0)
    if scale == "none":
        return centred
    if scale == "batch_std":
        deviation = scores.std() if scores.numel() > 1 else torch.zeros((), dtype=scores.dtype)
    elif scale == "group_std":
        deviation = group_std(scores, groups)
    else:
        raise ValueError(f"scale = {scale!r}: want 'group_std', 'batch_std' or 'none'")
    return centred / (deviation + STD_EPSILON)


def leave_one_out_advantages(
    scores: Float[Tensor, " samples"], groups: Int[Tensor, " samples"]
) -> Float[Tensor, " samples"]:
    """RLOO: A_i = R_i - mean of the group's other scores, which is (R_i - R̄) N / (N - 1).

    Exactly 0 in a group whose scores are all equal, a group of one included: it has no others.

    Args:
        scores: one finite score for each sample.
        groups: index of each sample's group.

    Sources: Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!" (2019); Ahmadian et al.,
    arXiv:2402.14740, eq. 8. TRL's RLOO divides by a standard deviation on top where asked to; this does not.
    """
    number = int(groups.max()) + 1 if groups.numel() else 0
    count = torch.zeros(number, dtype=scores.dtype).index_add_(0, groups, torch.ones_like(scores))[groups]
    centred = (scores - group_mean(scores, groups)).where(~without_signal(scores, groups), 0.0)
    return centred * count / (count - 1).clamp(min=1)


def process_advantages(
    rewards: Float[Tensor, " steps"],
    samples: Int[Tensor, " steps"],
    groups: Int[Tensor, " steps"],
    *,
    scale: str,
) -> Float[Tensor, " steps"]:
    """GRPO with process supervision: the advantage of each step, which all of the step's tokens share.

    The rewards of all steps of all samples of a group are normalised together; a step's advantage is the sum of
    the normalised rewards of itself and of the later steps of its sample.

    Args:
        rewards: one finite reward for each step; the steps of a sample stand together, in their order.
        samples: index of each step's sample.
        groups: index of each step's group.
        scale: as in `group_relative_advantages`, over steps instead of samples; `group_std` is the paper's.

    A sum over steps favours samples with more steps of positive normalised reward: step-count gaming.

    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.3. It divides by std(R) without saying which; N - 1 and the
    epsilon are those of `group_relative_advantages`. TRL and verl have no such variant.
    """
    normalised = group_relative_advantages(rewards, groups, scale=scale).tolist()
    owners = samples.tolist()
    sums = list(normalised)
    for k in range(len(sums) - 2, -1, -1):
        if owners[k] == owners[k + 1]:
            sums[k] += sums[k + 1]
    return rewards.new_tensor(sums)
