"""Log-probabilities and entropies of the tokens asked for, without a `[tokens, vocabulary]` tensor in memory.

The LM head runs over blocks of the vocabulary with a running softmax; the backward pass computes each block's
logits again, and writes each block of the weight's gradient once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.kernels import products
from graft.update.kept_rows import KeptRows, forbid_

BLOCK = 4096
"""Tokens of the vocabulary whose logits are in memory at once; a multiple of 32."""


class TokenScores(NamedTuple):
    """What the head says about each token."""

    logprobs: Tensor  # fp32 [N], nats of the distribution divided by the temperature
    entropies: Tensor  # fp32 [N], nats; of the same distribution
    values: Tensor | None = None  # fp32 [N], of the state before the token; None: there is no value model


class RunningSoftmax(NamedTuple):
    """A softmax over the columns seen so far. Each `[N]`, rows of one tensor."""

    top: Tensor  # max z
    total: Tensor  # Σ exp(z - top)
    weighted: Tensor  # Σ exp(z - top) (z - top)

    @classmethod
    def start(cls, rows: int, like: Tensor) -> RunningSoftmax:
        """Nothing seen."""
        state = like.new_zeros(3, rows)
        state[0] = -torch.inf
        return cls(*state.unbind())

    def log_sum(self) -> Tensor:
        """log Σ exp(z)."""
        return self.top + self.total.log()

    def entropy(self) -> Tensor:
        """-Σ p log p = log total - weighted / total; no large numbers cancel."""
        return self.total.log() - self.weighted / self.total


class RowFacts(NamedTuple):
    """What the gradient of a block needs of each row. Each `[N]`, rows of one tensor."""

    log_sum: Tensor
    entropy: Tensor
    d_logprob: Tensor
    d_entropy: Tensor


class HeadKernels(Protocol):
    """What is computed for a block of n vocabulary entries. Softmax and sums are fp32 (fp64 for fp64)."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden · weightᵀ: `[N, width]`, `[n, width]` -> `[N, n]`."""
        ...

    def fold_(self, logits: Tensor, factor: float, state: RunningSoftmax) -> None:
        """Multiply the logits by the factor and add them to the softmax, both in place."""
        ...

    def gradient(self, logits: Tensor, factor: float, facts: RowFacts, targets: Tensor, first: int) -> Tensor:
        """d_logits of a block that starts at vocabulary entry `first`; may overwrite the logits."""
        ...

    def add_hidden(self, d_logits: Tensor, weight: Tensor, total: Tensor) -> None:
        """total += d_logits · weight, in place: `[N, width]`."""
        ...

    def weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        """out = d_logitsᵀ · hidden: `[n, width]`."""
        ...


class TorchHead:
    """`HeadKernels` by torch, with the products' factors rounded to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See `HeadKernels.logits`."""
        return (hidden.to(self.dtype) @ weight.to(self.dtype).T).to(self.wide)

    def fold_(self, logits: Tensor, factor: float, state: RunningSoftmax) -> None:
        """See `HeadKernels.fold_`."""
        z = logits.mul_(factor)
        top = torch.maximum(state.top, z.amax(-1))
        drop = torch.where(state.total == 0, 0, state.top - top)
        shifted = z - top[:, None]
        p = shifted.exp()
        scale = drop.exp()
        state.weighted.copy_(scale * (state.weighted + drop * state.total) + (p * shifted).sum(-1))
        state.total.mul_(scale).add_(p.sum(-1))
        state.top.copy_(top)

    def gradient(self, logits: Tensor, factor: float, facts: RowFacts, targets: Tensor, first: int) -> Tensor:
        """See `HeadKernels.gradient`: (d_logprob (1[i = target] - p) - d_entropy p (log p + H)) factor."""
        log_p = logits.mul_(factor).sub_(facts.log_sum[:, None])
        slope = facts.d_entropy[:, None] * (log_p + facts.entropy[:, None]) + facts.d_logprob[:, None]
        d_logits = log_p.exp().mul_(slope).neg_()
        rows = ((targets >= first) & (targets < first + logits.shape[1])).nonzero()[:, 0]
        d_logits[rows, targets[rows] - first] += facts.d_logprob[rows]
        return d_logits.mul_(factor)

    def add_hidden(self, d_logits: Tensor, weight: Tensor, total: Tensor) -> None:
        """See `HeadKernels.add_hidden`."""
        total += d_logits.to(self.dtype) @ weight.to(self.dtype)

    def weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        """See `HeadKernels.weight`."""
        out.copy_(d_logits.to(self.dtype).T @ hidden.to(self.dtype))


class NativeHead:
    """`HeadKernels` by the native kernels: products of bf16 factors, fp32 otherwise."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See `HeadKernels.logits`."""
        return products.matmul_nt(hidden, weight)

    def fold_(self, logits: Tensor, factor: float, state: RunningSoftmax) -> None:
        """See `HeadKernels.fold_`."""
        products.require_kernels().run("graft_softmax_block", logits, *logits.shape, factor, state.top)

    def gradient(self, logits: Tensor, factor: float, facts: RowFacts, targets: Tensor, first: int) -> Tensor:
        """See `HeadKernels.gradient`; bf16, as the products round it in any case."""
        out = products.bf16_rows(*logits.shape)
        products.require_kernels().run(
            "graft_softmax_gradient",
            logits,
            *logits.shape,
            factor,
            facts.log_sum,
            targets,
            first,
            out,
            out.stride(0),
        )
        return out

    def add_hidden(self, d_logits: Tensor, weight: Tensor, total: Tensor) -> None:
        """See `HeadKernels.add_hidden`."""
        products.matmul_nn(d_logits, weight, add_to=total)

    def weight(self, d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
        """See `HeadKernels.weight`."""
        products.matmul_tn(d_logits, hidden, out=out)


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool,
    kernels: HeadKernels,
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
        kernels: what computes.
        kept: the tokens that could be drawn at each of the N places; None: all.
    """
    logprobs, entropies = _BlockedHead.apply(  # pyright: ignore
        hidden, weight, targets, temperature, entropy_gradient, kernels, kept
    )
    return TokenScores(logprobs, entropies)


class _BlockedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy_gradient: bool,
        kernels: HeadKernels,
        kept: KeptRows | None,
    ) -> tuple[Tensor, Tensor]:
        wide, targets = _wide(hidden), targets.contiguous()
        state = RunningSoftmax.start(len(targets), hidden.new_empty(0, dtype=wide))
        chosen = hidden.new_zeros(len(targets), dtype=wide)
        for first, logits in _blocks(hidden, weight, kernels, kept):
            kernels.fold_(logits, 1 / temperature, state)
            inside = ((targets >= first) & (targets < first + logits.shape[1])).nonzero()[:, 0]
            chosen[inside] = logits[inside, targets[inside] - first]
        log_sum, entropies = state.log_sum(), state.entropy()
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropies)
        ctx.settings = (temperature, entropy_gradient, kernels, kept)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return chosen - log_sum, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, targets, log_sum, entropies = ctx.saved_tensors
        temperature, entropy_gradient, kernels, kept = ctx.settings
        wide = _wide(hidden)
        d_entropies = d_entropies if entropy_gradient else torch.zeros_like(d_logprobs)
        facts = RowFacts(
            *torch.stack([log_sum, entropies, d_logprobs.to(wide), d_entropies.to(wide)]).unbind()
        )
        d_hidden = torch.zeros_like(hidden, dtype=wide)
        d_weight = torch.empty_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for first, logits in _blocks(hidden, weight, kernels, kept):
            rows = slice(first, first + logits.shape[1])
            d_logits = kernels.gradient(logits, 1 / temperature, facts, targets, first)
            if ctx.needs_input_grad[0]:
                kernels.add_hidden(d_logits, weight[rows], d_hidden)
            if d_weight is not None:
                kernels.weight(d_logits, hidden, d_weight[rows])
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None, None


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(
    hidden: Tensor, weight: Tensor, kernels: HeadKernels, kept: KeptRows | None
) -> Iterator[tuple[int, Tensor]]:
    """First vocabulary entry and logits of each block, without the tokens that could not be drawn."""
    bitmaps = None if kept is None else kept.bitmaps()
    for first in range(0, len(weight), BLOCK):
        logits = kernels.logits(hidden, weight[first : first + BLOCK])
        yield first, logits if bitmaps is None else forbid_(logits, bitmaps, first)
