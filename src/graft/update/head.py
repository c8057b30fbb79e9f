"""Log-probabilities and entropies of the tokens asked for, without a `[tokens, vocabulary]` tensor in memory.

The LM head runs over chunks of rows; the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 256
"""Rows whose logits are in memory at once."""


class TokenScores(NamedTuple):
    """What the head says about each token."""

    logprobs: Tensor  # fp32 [N], nats of the distribution divided by the temperature
    entropies: Tensor  # fp32 [N], nats; of the full distribution


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool,
    compute_dtype: torch.dtype,
) -> TokenScores:
    """log π(target | hidden) and H(π(· | hidden)), with z = hidden · weightᵀ / temperature.

        log π = z_target - logsumexp(z),   H = logsumexp(z) - Σ π z

    Args:
        hidden: `[N, width]`, the normalised states that predict the targets.
        weight: `[vocabulary, width]`, the LM head. Gets a gradient if it asks for one.
        targets: int64 `[N]`.
        temperature: of the distribution that was sampled from.
        entropy_gradient: whether the entropies carry a gradient; without one they are for reporting.
        compute_dtype: type of the matrix products; sums and softmax are fp32 (fp64 for fp64).
    """
    logprobs, entropies = _ChunkedHead.apply(
        hidden, weight, targets, temperature, entropy_gradient, compute_dtype
    )  # pyright: ignore
    return TokenScores(logprobs, entropies)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy_gradient: bool,
        compute_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(compute_dtype)
        head = weight.detach().to(compute_dtype)
        logprobs = hidden.new_empty(len(targets), dtype=wide)
        entropies = hidden.new_empty(len(targets), dtype=wide)
        for rows in torch.arange(len(targets), device=hidden.device).split(CHUNK):
            logits = (hidden[rows].to(compute_dtype) @ head.T).to(wide) / temperature
            total = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - total
            # p log p is taken as p (z - lse): no second exponential and no log of 0
            entropies[rows] = -(torch.exp(logits - total[:, None]) * (logits - total[:, None])).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = (temperature, entropy_gradient, compute_dtype)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, targets = ctx.saved_tensors
        temperature, entropy_gradient, compute_dtype = ctx.settings
        wide = _wide(compute_dtype)
        head = weight.detach().to(compute_dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows in torch.arange(len(targets), device=hidden.device).split(CHUNK):
            states = hidden[rows].to(compute_dtype)
            logits = (states @ head.T).to(wide) / temperature
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            coefficient = d_logprobs[rows, None].to(wide)
            d_logits = p * -coefficient
            if entropy_gradient:
                entropy = -(p * log_p).sum(-1, keepdim=True)
                d_logits -= d_entropies[rows, None].to(wide) * p * (log_p + entropy)
            d_logits.scatter_add_(1, targets[rows, None], coefficient)
            d_logits = (d_logits / temperature).to(compute_dtype)
            d_hidden[rows] = (d_logits @ head).to(hidden.dtype)
            if d_weight is not None:
                d_weight += (d_logits.T @ states).to(wide)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None
