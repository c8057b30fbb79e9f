"""Attention over a packed row of trees: each token sees its own span up to itself, and all of its ancestors.

Enters Hugging Face models through transformers' AttentionInterface under the name `graft_tree`; the layout travels
as a keyword argument of the model's forward call. On a CPU the work is cut into parts that are plain rectangles:
every span with itself (causal) and every span with all that hangs below it (not causal). Each part is one
flash-attention call; their results are merged by the log-sum-exp of their scores, and the backward pass hands each
part the merged output and log-sum-exp, which makes it exact (as in ring attention, arXiv:2310.01889). Elsewhere
a dense mask does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft.kernels.tree_attention import SpanTable
from graft.update.packing import Span

NAME = "graft_tree"

PADDING_SHARE = 0.25
"""Spans share one padded call as long as each is at least this much of 1 - PADDING_SHARE of the longest."""


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """Where the spans of a packed row stand, and which of them are attended to in one padded call."""

    spans: tuple[Span, ...]
    buckets: tuple[tuple[Span, ...], ...]
    table: SpanTable

    @classmethod
    def of(cls, spans: Sequence[Span]) -> TreeLayout:
        """Sort spans into buckets of similar length."""
        buckets: list[list[Span]] = []
        for span in sorted(spans, key=lambda s: s.start - s.end):
            longest = buckets[-1][0].end - buckets[-1][0].start if buckets else 0
            if span.end - span.start >= (1 - PADDING_SHARE) * longest and buckets:
                buckets[-1].append(span)
            else:
                buckets.append([span])
        return cls(tuple(spans), tuple(tuple(b) for b in buckets), SpanTable.of(spans))


def register() -> None:
    """Make `attn_implementation="graft_tree"` known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_for_transformers)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout says what is seen; transformers need not build a mask."""


def _attention_for_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    tree_layout: TreeLayout,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    output = tree_attention(query, key, value, tree_layout, scale=scale)
    return output.transpose(1, 2).to(value.dtype), None


def tree_attention(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float) -> Tensor:
    """Attention of a packed row. Computed in fp32 (fp64 stays fp64), whatever the inputs.

    Args:
        query: `[1, heads, T, width]`.
        key: `[1, key/value heads, T, width]`; heads is a multiple of key/value heads.
        value: as `key`.
        layout: where the spans stand.
        scale: multiplies the scores.

    Returns:
        `[1, heads, T, width]`.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type == "cpu":
        return _PartsAttention.apply(query, key, value, layout, scale)  # pyright: ignore[reportReturnType]
    return dense_tree_attention(query, key, value, layout, scale=scale)


def dense_tree_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, *, scale: float
) -> Tensor:
    """The same with a `[T, T]` mask, for devices without the parts' kernel, and the oracle of the tests."""
    mask = dense_mask(layout.spans, query.shape[2], query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def dense_mask(spans: Sequence[Span], length: int, device: torch.device) -> Tensor:
    """Bool `[length, length]`: True where the row's token sees the column's."""
    mask = torch.zeros(length, length, dtype=torch.bool, device=device)
    for span in spans:
        own = span.end - span.start
        mask[span.start : span.end, span.start : span.end] = torch.ones(own, own, device=device).tril().bool()
        mask[span.end : span.subtree_end, span.start : span.end] = True
    return mask


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _PartsAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float
    ) -> Tensor:
        _, heads, length, width = query.shape
        output = query.new_zeros(1, heads, length, width)
        sums = query.new_full((1, heads, length), -torch.inf)
        for bucket in layout.buckets:
            parts = [_gather(x, bucket) for x in (query, key, value)]
            out, lse = _flash(*_repeat_heads(*parts), 0.0, True, scale=scale)
            for row, span in enumerate(bucket):
                own = span.end - span.start
                output[0, :, span.start : span.end] = out[row, :, :own]
                sums[0, :, span.start : span.end] = lse[row, :, :own]
        for span in layout.spans:
            if span.subtree_end > span.end:
                below = slice(span.end, span.subtree_end)
                out, lse = _flash(*_rectangle(query, key, value, span), 0.0, False, scale=scale)
                _merge(
                    output[0, :, below],
                    sums[0, :, below],
                    _unfold(out, heads),
                    _unfold(lse[..., None], heads)[..., 0],
                )
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore
        query, key, value, output, sums = ctx.saved_tensors
        layout, scale, gradient = ctx.layout, ctx.scale, gradients[0]
        heads, key_heads = query.shape[1], key.shape[1]
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        for bucket in layout.buckets:
            parts = _repeat_heads(*(_gather(x, bucket) for x in (query, key, value)))
            padded_gradient, padded_output = _gather(gradient, bucket), _gather(output, bucket)
            padded_sums = _gather(sums[..., None], bucket)[..., 0]
            dq, dk, dv = _flash_backward(
                padded_gradient, *parts, padded_output, padded_sums, 0.0, True, scale=scale
            )
            dk, dv = (x.unflatten(1, (key_heads, heads // key_heads)).sum(2) for x in (dk, dv))
            for row, span in enumerate(bucket):
                own = span.end - span.start
                d_query[0, :, span.start : span.end] += dq[row, :, :own]
                d_key[0, :, span.start : span.end] += dk[row, :, :own]
                d_value[0, :, span.start : span.end] += dv[row, :, :own]
        for span in layout.spans:
            if span.subtree_end > span.end:
                below, own = slice(span.end, span.subtree_end), slice(span.start, span.end)
                folded = [_fold(x[0, :, below], key_heads) for x in (gradient, output, sums[..., None])]
                dq, dk, dv = _flash_backward(
                    folded[0],
                    *_rectangle(query, key, value, span),
                    folded[1],
                    folded[2][..., 0],
                    0.0,
                    False,
                    scale=scale,
                )
                d_query[0, :, below] += _unfold(dq, heads)
                d_key[0, :, own] += dk[0]
                d_value[0, :, own] += dv[0]
        return d_query, d_key, d_value, None, None


def _gather(x: Tensor, bucket: Sequence[Span]) -> Tensor:
    """`[1, H, T, D]` -> `[spans, H, longest, D]`, padded with zeros on the right.

    A causal call never lets a real token see the padding behind it, and padded queries have zero gradient.
    """
    longest = bucket[0].end - bucket[0].start
    padded = x.new_zeros(len(bucket), x.shape[1], longest, x.shape[3])
    for row, span in enumerate(bucket):
        padded[row, :, : span.end - span.start] = x[0, :, span.start : span.end]
    return padded


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    return query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)


def _rectangle(query: Tensor, key: Tensor, value: Tensor, span: Span) -> tuple[Tensor, Tensor, Tensor]:
    """All that hangs below a span, against the span: query heads that share a key head become more queries."""
    own = slice(span.start, span.end)
    folded = _fold(query[0, :, span.end : span.subtree_end], key.shape[1])
    return folded, key[:, :, own], value[:, :, own]


def _fold(x: Tensor, key_heads: int) -> Tensor:
    """`[H, n, D]` -> `[1, key heads, H / key heads * n, D]`."""
    return x.reshape(1, key_heads, -1, x.shape[-1])


def _unfold(x: Tensor, heads: int) -> Tensor:
    """`[1, key heads, H / key heads * n, D]` -> `[H, n, D]`."""
    return x.reshape(heads, -1, x.shape[-1])


def _merge(output: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> None:
    """Add another set of keys to a softmax average in place: `[H, n, D]` and its log-sum-exp `[H, n]`."""
    total = torch.logaddexp(sums, other_sums)
    output.mul_(torch.exp(sums - total)[..., None]).add_(other * torch.exp(other_sums - total)[..., None])
    sums.copy_(total)
