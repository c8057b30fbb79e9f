"""Log-probabilities, entropies and the exact KL of the tokens asked for, without a `[tokens, vocabulary]` tensor.

The LM head runs over blocks of the vocabulary with a running softmax; the backward pass computes each block's
logits again, and adds each block of the weight's gradient to what is there. For the KL the anchor's block of logits is
computed beside the policy's, from the anchor's hidden states. Its products are those of `HeadKernels` like all others;
its softmax gradient is torch's in any case, and added to the block's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.kernels import products
from graft.update.gradients import gradient_place
from graft.update.kept_rows import KeptRows, forbid_

BLOCK = 4096
"""Tokens of the vocabulary whose logits are in memory at once; a multiple of 32."""


class TokenScores(NamedTuple):
    """What the head says about each token."""

    logprobs: Tensor  # fp32 [N], nats of the distribution divided by the temperature
    entropies: Tensor  # fp32 [N], nats; of the same distribution
    values: Tensor | None = None  # fp32 [N], of the state before the token; None: there is no value model
    kl: Tensor | None = (
        None  # fp32 [N], nats: KL(policy || anchor) there, over the vocabulary; None: no anchor
    )


class AnchorHead(NamedTuple):
    """What the KL is measured from. No gradient goes there."""

    hidden: Tensor  # [N, width], the anchor's normalised states that predict the same targets
    weight: Tensor  # [vocabulary, width], its LM head


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


class RunningKL:
    """KL(π || π_anchor) of rows whose logits z and y come in blocks."""

    def __init__(self, policy: RunningSoftmax) -> None:
        """
        Args:
            policy: the softmax of z, to which each block is added before it is added here.
        """
        self.policy = policy
        self.anchor = RunningSoftmax.start(len(policy.top), policy.top)
        self._top = policy.top.clone()
        self._difference = torch.zeros_like(policy.top)  # Σ exp(z - top) (z - y)

    def fold_(self, z: Tensor, y: Tensor) -> None:
        """Add a block to Σ exp(z - top) (z - y)."""
        top = self.policy.top
        block = ((z - top[:, None]).exp() * (z - y)).sum(-1)
        self._difference.mul_((self._top - top).exp()).add_(block)
        self._top.copy_(top)

    def value(self) -> Tensor:
        """Σ π (z - y) - logsumexp(z) + logsumexp(y)."""
        tops, totals = self.policy.top - self.anchor.top, self.policy.total / self.anchor.total
        return self._difference / self.policy.total - tops - totals.log()


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

    def add_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor) -> None:
        """total += d_logitsᵀ · hidden, in place: `[n, width]`."""
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

    def add_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor) -> None:
        """See `HeadKernels.add_weight`."""
        total += d_logits.to(self.dtype).T @ hidden.to(self.dtype)


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

    def add_weight(self, d_logits: Tensor, hidden: Tensor, total: Tensor) -> None:
        """See `HeadKernels.add_weight`."""
        products.matmul_tn(d_logits, hidden, add_to=total)


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy_gradient: bool,
    kernels: HeadKernels,
    kept: KeptRows | None = None,
    anchor: AnchorHead | None = None,
) -> TokenScores:
    """log π(target | hidden) and H(π(· | hidden)), with z = hidden · weightᵀ / temperature.

        log π = z_target - logsumexp(z),   H = logsumexp(z) - Σ π z
        KL    = Σ π (log π - log π_anchor)

    Where `kept` says which tokens could be drawn, π, π_anchor and all sums are over these alone.

    Args:
        hidden: `[N, width]`, the normalised states that predict the targets.
        weight: `[vocabulary, width]`, the LM head. Gets a gradient if it asks for one; see `gradient_place`.
        targets: int64 `[N]`.
        temperature: of the distribution that was sampled from.
        entropy_gradient: whether the entropies carry a gradient; without one they are for reporting.
        kernels: what computes.
        kept: the tokens that could be drawn at each of the N places; None: all.
        anchor: asks for the KL to it, which carries a gradient.
    """
    logprobs, entropies, kl = _BlockedHead.apply(  # pyright: ignore
        hidden, weight, targets, temperature, entropy_gradient, kernels, kept, anchor
    )
    return TokenScores(logprobs, entropies, kl=kl)


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
        anchor: AnchorHead | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        wide, targets = _wide(hidden), targets.contiguous()
        state = RunningSoftmax.start(len(targets), hidden.new_empty(0, dtype=wide))
        chosen = hidden.new_zeros(len(targets), dtype=wide)
        kl = None if anchor is None else RunningKL(state)
        for first, logits, anchor_logits in _blocks(hidden, weight, kernels, kept, anchor):
            kernels.fold_(logits, 1 / temperature, state)
            inside = ((targets >= first) & (targets < first + logits.shape[1])).nonzero()[:, 0]
            chosen[inside] = logits[inside, targets[inside] - first]
            if kl is not None and anchor_logits is not None:
                kernels.fold_(anchor_logits, 1 / temperature, kl.anchor)
                kl.fold_(logits, anchor_logits)
        log_sum, entropies = state.log_sum(), state.entropy()
        divergence = None if kl is None else kl.value()
        beside = () if kl is None else (divergence, kl.anchor.log_sum())
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropies, *beside)
        ctx.settings = (temperature, entropy_gradient, kernels, kept, anchor)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropies)
        return chosen - log_sum, entropies, divergence

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore
        ctx: Any, d_logprobs: Tensor, d_entropies: Tensor, d_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum, entropies, *beside = ctx.saved_tensors
        temperature, entropy_gradient, kernels, kept, anchor = ctx.settings
        wide = _wide(hidden)
        d_entropies = d_entropies if entropy_gradient else torch.zeros_like(d_logprobs)
        facts = RowFacts(
            *torch.stack([log_sum, entropies, d_logprobs.to(wide), d_entropies.to(wide)]).unbind()
        )
        d_hidden = torch.zeros_like(hidden, dtype=wide)
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        place = gradient_place(weight) if need_weight else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight and place is None else place
        for first, logits, anchor_logits in _blocks(hidden, weight, kernels, kept, anchor):
            rows = slice(first, first + logits.shape[1])
            d_kl_logits = None
            if anchor_logits is not None and d_kl is not None:
                kl, anchor_log_sum = beside
                d_kl_logits = _kl_gradient(
                    logits, anchor_logits, 1 / temperature, log_sum, kl, anchor_log_sum, d_kl
                )
            d_logits = kernels.gradient(logits, 1 / temperature, facts, targets, first)
            if d_kl_logits is not None:
                d_logits.add_(d_kl_logits)
            if need_hidden:
                kernels.add_hidden(d_logits, weight[rows], d_hidden)
            if d_weight is not None:
                kernels.add_weight(d_logits, hidden, d_weight[rows])
        d_weight = None if d_weight is None or place is not None else d_weight.to(weight.dtype)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None, None, None


def _kl_gradient(
    logits: Tensor,
    anchor_logits: Tensor,
    factor: float,
    log_sum: Tensor,
    kl: Tensor,
    anchor_log_sum: Tensor,
    d_kl: Tensor,
) -> Tensor:
    """d_logits of the KL in a block: d_kl π (log π - log π_anchor - KL) factor. Leaves the logits as they are."""
    log_p = logits * factor - log_sum[:, None]
    log_ratio = log_p - (anchor_logits * factor - anchor_log_sum[:, None])
    return log_p.exp().mul_(log_ratio - kl[:, None]).mul_(d_kl[:, None] * factor)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(
    hidden: Tensor, weight: Tensor, kernels: HeadKernels, kept: KeptRows | None, anchor: AnchorHead | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """First vocabulary entry and logits of each block, those of the anchor beside them; without the tokens that could
    not be drawn."""
    bitmaps = None if kept is None else kept.bitmaps()

    def logits_of(states: Tensor, head: Tensor, first: int) -> Tensor:
        logits = kernels.logits(states, head[first : first + BLOCK])
        return logits if bitmaps is None else forbid_(logits, bitmaps, first)

    for first in range(0, len(weight), BLOCK):
        beside = None if anchor is None else logits_of(anchor.hidden, anchor.weight, first)
        yield first, logits_of(hidden, weight, first), beside
