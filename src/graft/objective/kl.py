"""Per-token estimates of KL(policy || anchor) from the policy's own samples, and the exact KL that they estimate.

With r = π_anchor / π_θ of the sampled token (Schulman, "Approximating KL divergence", 2020):

| estimator | value          | as a value                | its gradient as a loss (on-policy)                       |
|-----------|----------------|---------------------------|----------------------------------------------------------|
| k1        | -log r         | unbiased, can be negative | has expectation 0: trains nothing; right in the reward   |
| k2        | (log r)² / 2   | biased, low variance      | equals that of KL(π_θ || anchor)                         |
| k3        | r - 1 - log r  | unbiased, never negative  | a first-order biased approximation (arXiv:2510.01555)    |
| exact     | Σ π log(π / q) | the expectation of k1     | that of KL(π_θ || anchor) at the state                   |

`exact` sums over the vocabulary, with q the anchor's distribution; `update/head.py` computes it block by block. In the
loss it is k2 without k2's noise, on the policy's own samples and on others. In the reward it charges a token for the
states that it leads to and, since no state's KL depends on the token drawn there, not for its own: that part of the
gradient, which k1 has there, is missing.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def k1(
    logprobs: Float[Tensor, " tokens"], anchor_logprobs: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """log π_θ - log π_anchor."""
    return logprobs - anchor_logprobs


def k2(
    logprobs: Float[Tensor, " tokens"], anchor_logprobs: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """½ (log π_θ - log π_anchor)²."""
    return (logprobs - anchor_logprobs) ** 2 / 2


def k3(
    logprobs: Float[Tensor, " tokens"], anchor_logprobs: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """r - 1 - log r, with r = π_anchor / π_θ."""
    log_ratio = anchor_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}

EXACT = "exact"
"""Name of the KL over the whole vocabulary, which two log-probabilities of one token cannot give."""


def exact_kl(
    log_policy: Float[Tensor, "tokens vocabulary"], log_anchor: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """Σ π (log π - log π_anchor) from whole distributions: what `update/head.py` computes in blocks.

    Source: the deck, "Chain-of-Thought RFT Objective", L_KL, of the policy in training.
    """
    return (log_policy.exp() * (log_policy - log_anchor)).sum(-1)


def adapted_coefficient(
    coefficient: float, *, measured: float, target: float, horizon: int, samples: int
) -> float:
    """β for the next batch, of a KL penalty in the reward that is to stay near a target:

        β' = β (1 + clip(measured / target - 1, -0.2, 0.2) · min(samples / horizon, 1))

    A fixed β needs no function.

    Args:
        coefficient: β of this batch.
        measured: the batch's KL to the anchor: mean over completions of the sum over tokens of k1, nats.
        target: the KL wanted, nats a completion, above 0.
        horizon: after how many samples a lasting error of 20 % has moved β by some 20 %, e.g. 10,000.
        samples: completions in the batch.

    Source: Ziegler et al., "Fine-tuning language models from human preferences", arXiv:1909.08593, section 2.2, with
    the published code's horizon in place of K_β.
    """
    error = min(max(measured / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(samples / horizon, 1.0))
