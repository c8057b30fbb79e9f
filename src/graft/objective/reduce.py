"""From per-token losses to one number: a weight for each token, counted over the whole optimiser step.

A reduction is two steps. First, before the first micro-batch, these functions turn the lengths of all trained
samples of the step into one weight for each sample's tokens. Then every micro-batch adds `weighted_sum`, and the
sum over any cutting into micro-batches is the same number with the same gradient.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def sample_mean_weights(
    lengths: Int[Tensor, " samples"], *, samples_in_step: int
) -> Float[Tensor, " samples"]:
    """Mean over the tokens of a sample, then over samples: 1 / (samples |o_i|). GRPO's reduction.

    Args:
        lengths: trained tokens of each sample given here, at least 1.
        samples_in_step: all samples of the optimiser step, those left out for lack of signal included.
    """
    return 1.0 / (samples_in_step * lengths.double())


def token_mean_weights(lengths: Int[Tensor, " samples"], *, tokens_in_step: int) -> Float[Tensor, " samples"]:
    """Mean over all trained tokens of the step: 1 / tokens. DAPO's reduction."""
    return (lengths * 0 + 1).double() / tokens_in_step


def weighted_sum(per_token: Float[Tensor, " tokens"], weights: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """This micro-batch's share of the step's loss. Tokens of weight 0 must still hold finite numbers."""
    return (per_token * weights.to(per_token.dtype)).sum()
