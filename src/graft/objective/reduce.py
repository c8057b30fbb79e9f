"""From per-token losses to one number: a weight for each token, counted over the whole optimiser step.

A reduction is two steps. First, before the first micro-batch, these functions turn the lengths of all trained
samples of the step into one weight for each sample's tokens. Then every micro-batch adds `weighted_sum`, and the
sum over any cutting into micro-batches is the same number with the same gradient.
"""

from __future__ import annotations

import torch
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


def constant_weights(
    lengths: Int[Tensor, " samples"], *, samples_in_step: int, max_new_tokens: int
) -> Float[Tensor, " samples"]:
    """1 / (samples · max_new_tokens), whatever the lengths. Dr. GRPO's reduction, arXiv:2503.20783, section 3.

    TRL's `dr_grpo` counts the samples of the micro-batch and averages micro-batches, the same where all are equal.
    """
    return (lengths * 0 + 1).double() / (samples_in_step * max_new_tokens)


def segment_sum_weights(
    lengths: Int[Tensor, " segments"], *, completions_in_step: int
) -> Float[Tensor, " segments"]:
    """Sum over a completion's segments, mean over completions: 1 / (completions · N_k) for each token of segment k.

    With a ratio of the segment this is the deck's objective; with one of the token, the mean within a segment.

    Args:
        lengths: N_k, trained tokens of each segment, at least 1.
        completions_in_step: all completions of the optimiser step, those left out of it included.

    Source: the deck, "Chain-of-Thought RFT Objective", L_RFT.
    """
    return 1.0 / (completions_in_step * lengths.double())


def tree_weights(
    lengths: Int[Tensor, " nodes"],
    prompts: Int[Tensor, " nodes"],
    depths: Int[Tensor, " nodes"],
    *,
    prompts_in_step: int,
) -> Float[Tensor, " nodes"]:
    """Mean over prompts of Σ_depth (1 / nodes at that depth) Σ_nodes L_node, for each of a node's tokens:

        1 / (prompts · nodes of the prompt at the node's depth · N)

    Every node counts once, however many leaves hang below it. At depth one with as many samples for each prompt
    this is `sample_mean_weights`, to the bit.

    Args:
        lengths: N, trained tokens of each node, at least 1. All nodes of the step, also those of groups that are
            left out of the network for lack of signal: they count.
        prompts: index of each node's prompt.
        depths: depth of each node below its prompt.
        prompts_in_step: all prompts of the optimiser step.

    Source: ours, from the deck's "Reinforcement Fine-Tuning v2 (GRFT)".
    """
    places = torch.stack([prompts, depths])
    _, place, nodes_at = torch.unique(places, dim=1, return_inverse=True, return_counts=True)
    return 1.0 / (prompts_in_step * nodes_at[place] * lengths.double())


def weighted_sum(per_token: Float[Tensor, " tokens"], weights: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """This micro-batch's share of the step's loss. Tokens of weight 0 must still hold finite numbers."""
    return (per_token * weights.to(per_token.dtype)).sum()
