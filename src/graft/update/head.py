"""Log-probabilities and entropies of the tokens asked for, without a `[tokens, vocabulary]` tensor in memory.

The LM head runs over chunks of rows; the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from graft.kernels import linear
from graft.update.kept_rows import KeptRows

CHUNK = 256
"""Rows whose logits are in memory at once."""


class TokenScores(NamedTuple):
    """What the head says about each token."""

    logprobs: Tensor  # fp32 [N], nats of the distribution divided by the temperature
    entropies: Tensor  # fp32 [N], nats; of the same distribution


class Products(Protocol):
    """The head's three matrix products. Results are fp32 (fp64 for fp64 factors)."""

    def scores(self, states: Tensor, weight: Tensor) -> Tensor:
        """states · weightᵀ: `[n, width]`, `[vocabulary, width]` -> `[n, vocabulary]`."""
        ...

    def states(self, d_scores: Tensor, weight: Tensor) -> Tensor:
        """d_scores · weight: `[n, vocabulary]`, `[vocabulary, width]` -> `[n, width]`."""
        ...

    def add_weight(self, d_scores: Tensor, states: Tensor, total: Tensor) -> None:
        """total += d_scoresᵀ · states, in place: `[vocabulary, width]`."""
        ...


class TorchProducts:
    """`Products` by torch, with factors rounded to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def scores(self, states: Tensor, weight: Tensor) -> Tensor:
        """See `Products.scores`."""
        return (states.to(self.dtype) @ weight.to(self.dtype).T).to(self.wide)

    def states(self, d_scores: Tensor, weight: Tensor) -> Tensor:
        """See `Products.states`."""
        return (d_scores.to(self.dtype) @ weight.to(self.dtype)).to(self.wide)

    def add_weight(self, d_scores: Tensor, states: Tensor, total: Tensor) -> None:
        """See `Products.add_weight`."""
        if self.dtype == total.dtype:
            total.addmm_(d_scores.T, states)
        else:
            total += d_scores.to(self.dtype).T @ states.to(self.dtype)


class NativeProducts:
    """`Products` by the native kernels: bf16 factors, fp32 sums."""

    def scores(self, states: Tensor, weight: Tensor) -> Tensor:
        """See `Products.scores`."""
        return linear.matmul_nt(states, weight)

    def states(self, d_scores: Tensor, weight: Tensor) -> Tensor:
        """See `Products.states`."""
        return linear.matmul_nn(d_scores, weight)

    def add_weight(self, d_scores: Tensor, states: Tensor, total: Tensor) -> None:
        """See `Products.add_weight`."""
        linear.matmul_tn(d_scores, states, add_to=total)


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool,
    products: Products,
    kept: KeptRows | None = None,
) -> TokenScores:
    """log π(target | hidden) and H(π(· | hidden)), with z = hidden · weightᵀ / temperature.

        log π = z_target - logsumexp(z),   H = logsumexp(z) - Σ π z

    Where `kept` says which tokens could be drawn, π and all sums are over these alone.

    Args:
        hidden: `[N, width]`, the normalised states that predict the targets.
        weight: `[vocabulary, width]`, the LM head. Gets a gradient if it asks for one.
        targets: int64 `[N]`.
        temperature: of the distribution that was sampled from.
        entropy_gradient: whether the entropies carry a gradient; without one they are for reporting.
        products: what multiplies; softmax and sums are fp32 (fp64 for fp64).
        kept: the tokens that could be drawn at each of the N places; None: all.
    """
    logprobs, entropies = _ChunkedHead.apply(  # pyright: ignore
        hidden, weight, targets, temperature, entropy_gradient, products, kept
    )
    return TokenScores(logprobs, entropies)


def _logits(
    hidden: Tensor, weight: Tensor, first: int, temperature: float, products: Products, kept: KeptRows | None
) -> Tensor:
    """z of the rows from `first` on, without the tokens that could not be drawn."""
    logits = products.scores(hidden, weight).div_(temperature)
    return logits if kept is None else kept.forbid_(logits, first)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy_gradient: bool,
        products: Products,
        kept: KeptRows | None,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = hidden.new_empty(len(targets), dtype=wide)
        entropies = hidden.new_empty(len(targets), dtype=wide)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = _logits(hidden[rows], weight, start, temperature, products, kept)
            total = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - total
            # p log p is taken as p (z - lse): no logarithm of 0
            log_p = logits.sub_(total[:, None])
            entropies[rows] = -(log_p.exp().mul_(log_p)).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.settings = (temperature, entropy_gradient, products, kept)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, targets = ctx.saved_tensors
        temperature, entropy_gradient, products, kept = ctx.settings
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = _logits(hidden[rows], weight, start, temperature, products, kept).log_softmax(-1)
            p = log_p.exp()
            coefficient = d_logprobs[rows, None].to(wide)
            if entropy_gradient:
                entropy = -(p * log_p).sum(-1, keepdim=True)
                d_logits = -(coefficient + d_entropies[rows, None].to(wide) * (log_p + entropy)) * p
            else:
                d_logits = p.mul_(-coefficient)
            d_logits.scatter_add_(1, targets[rows, None], coefficient).div_(temperature)
            d_hidden[rows] = products.states(d_logits, weight).to(hidden.dtype)
            if d_weight is not None:
                products.add_weight(d_logits, hidden[rows], d_weight)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None, None
