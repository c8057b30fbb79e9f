"""REINFORCE with a running mean of past scores as its baseline."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class RunningMean(NamedTuple):
    """What is carried from batch to batch, and belongs into a checkpoint."""

    mean: float = 0.0
    """Of the scores seen so far, older ones discounted."""

    weight: float = 0.0
    """How many scores it stands for; 0 before the first batch."""


class BaselinedBatch(NamedTuple):
    """What `running_mean_advantages` returns."""

    advantages: Tensor
    """`[samples]`"""

    carried: RunningMean
    """For the next batch."""


def running_mean_advantages(
    scores: Float[Tensor, " samples"], carried: RunningMean, *, decay: float
) -> BaselinedBatch:
    """A_i = R_i - b with b the mean of the batches before this one, whose scores enter it only afterwards:

        mean' = (decay · weight · mean + Σ R) / weight',    weight' = decay · weight + N

    A sample's own score is never part of its baseline, so that the gradient has no bias. The first batch has no past:
    there b is the mean of the batch's other scores (0 advantage for a batch of one). A baseline of 0 would be as
    unbiased, but would push every sample up where all scores are positive.

    Args:
        scores: one finite score for each sample of the batch, whatever its prompt.
        carried: the state after the batch before; `RunningMean()` at the start.
        decay: weight of the past when a batch enters, 0 to 1. 1 is the mean of all scores ever, 0 the last batch's.

    Source: Williams, "Simple statistical gradient-following algorithms" (1992), reinforcement baseline.
    """
    number = scores.numel()
    if number == 0:
        return BaselinedBatch(scores, carried)
    own = scores.mean()
    from_the_others = (scores - own) * (number / max(number - 1, 1))
    advantages = scores - carried.mean if carried.weight > 0 else from_the_others
    past = decay * carried.weight
    weight = past + number
    mean = carried.mean + (float(own) - carried.mean) * (number / weight)
    return BaselinedBatch(advantages, RunningMean(mean, weight))
