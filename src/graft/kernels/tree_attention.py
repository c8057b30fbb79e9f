"""The attention block of a training step as one function: projections, rotary embedding, tree attention, output."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from graft.kernels.products import (
    bf16_rows,
    matmul_nn,
    matmul_tn,
    multiply,
    pack_nt,
    require_kernels,
    round_rows,
    sum_of_matmul_nn,
    with_bias,
)


class TreeAttentionFields(ctypes.Structure):
    """`struct TreeAttention` in attention.h."""

    _fields_ = [
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("sums", c_void_p),
        ("d_out", c_void_p),
        ("d_query", c_void_p),
        ("d_key", c_void_p),
        ("d_value", c_void_p),
        ("spans", c_void_p),
        ("span_count", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("scale", c_float),
    ]


class SpanLike(Protocol):
    """A node's place in the packed row: its own tokens start..end, its descendants' end..subtree_end."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def subtree_end(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SpanTable:
    """Spans of a packed row as the kernels read them."""

    spans: torch.Tensor  # int64 [spans, 3]: start, end, end of the subtree; in row order

    @classmethod
    def of(cls, spans: Sequence[SpanLike]) -> SpanTable:
        """From spans in row order."""
        rows = [[span.start, span.end, span.subtree_end] for span in spans]
        return cls(torch.tensor(rows).view(-1, 3))

    @classmethod
    def one_span(cls, tokens: int) -> SpanTable:
        """One causal sequence."""
        return cls(torch.tensor([[0, tokens, tokens]]))


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of an attention block. `dim` is a multiple of 16."""

    heads: int
    kv_heads: int
    dim: int
    scale: float


@dataclass(slots=True)
class Attended:
    """What the backward pass needs of the forward pass. T tokens."""

    query: torch.Tensor  # bf16 [T, heads dim], rotated
    key: torch.Tensor  # bf16 [T, kv_heads dim], rotated
    value: torch.Tensor  # bf16 [T, kv_heads dim]
    out: torch.Tensor  # bf16 [T, heads dim]
    sums: torch.Tensor  # fp32 [T, heads]: log-sum-exp of the scores


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: SpanTable, shape: HeadShape
) -> Attended:
    """Tree attention of bf16 `[T, heads dim]` queries and `[T, kv_heads dim]` keys and values.

    Products have fp32 sums and the softmax is fp32; probabilities are rounded to bf16 before they multiply the values,
    as in FlashAttention (arXiv:2205.14135). A token's result is the same to the bit whatever else is in the row, and
    for any number of threads.
    """
    tokens = len(query)
    for name, x, heads in (
        ("query", query, shape.heads),
        ("key", key, shape.kv_heads),
        ("value", value, shape.kv_heads),
    ):
        _expect(name, x, torch.bfloat16, (tokens, heads * shape.dim))
    result = Attended(
        query, key, value, bf16_rows(tokens, shape.heads * shape.dim), torch.empty(tokens, shape.heads)
    )
    fields = _fields(result, table, shape)
    require_kernels().run("graft_tree_attention", ctypes.addressof(fields))
    return result


def attend_gradient(
    d_out: torch.Tensor, attended: Attended, table: SpanTable, shape: HeadShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 gradients of query, key and value, given fp32 `[T, heads dim]` of the output.

    The given gradient, the probabilities and the gradients of the scores are rounded to bf16 where they are factors.
    Results are the same to the bit for any number of threads.
    """
    tokens = len(d_out)
    _expect("d_out", d_out, torch.float32, (tokens, shape.heads * shape.dim))
    gradients = tuple(
        torch.empty(tokens, heads * shape.dim) for heads in (shape.heads, *[shape.kv_heads] * 2)
    )
    fields = _fields(attended, table, shape)
    fields.d_out = d_out.data_ptr()
    fields.d_query, fields.d_key, fields.d_value = (gradient.data_ptr() for gradient in gradients)
    require_kernels().run("graft_tree_attention_gradient", ctypes.addressof(fields))
    return gradients  # pyright: ignore[reportReturnType]


def _fields(a: Attended, table: SpanTable, shape: HeadShape) -> TreeAttentionFields:
    return TreeAttentionFields(
        query=a.query.data_ptr(),
        key=a.key.data_ptr(),
        value=a.value.data_ptr(),
        out=a.out.data_ptr(),
        out_stride=a.out.stride(0),
        sums=a.sums.data_ptr(),
        spans=table.spans.data_ptr(),
        span_count=len(table.spans),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        dim=shape.dim,
        scale=shape.scale,
    )


def _expect(name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name}: want contiguous {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, dim: int) -> torch.Tensor:
    """bf16 `[T, heads dim]`: each head of fp32 x turned by its row's angles (`[T, dim]` fp32)."""
    _expect("x", x, torch.float32, (len(x), x.shape[1]))
    for name, angles in (("cosines", cosines), ("sines", sines)):
        _expect(name, angles, torch.float32, (len(x), dim))
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    require_kernels().run("graft_rotate", x, cosines, sines, len(x), x.shape[1] // dim, dim, out)
    return out


def rotate_back_(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, dim: int) -> torch.Tensor:
    """The transposed map on gradients, in place."""
    require_kernels().run("graft_rotate_back", x, cosines, sines, len(x), x.shape[1] // dim, dim)
    return x


class AttentionBlock(torch.autograd.Function):
    """y = attention(x Wq^T, x Wk^T, x Wv^T) Wo^T with rotary embedding, for a packed row of trees.

    All products have bf16 factors and fp32 sums, those of the attention, too: probabilities are rounded to bf16; scores
    and softmax are fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
        output_weight: torch.Tensor,
        query_bias: torch.Tensor | None,
        key_bias: torch.Tensor | None,
        value_bias: torch.Tensor | None,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        table: SpanTable,
        shape: HeadShape,
    ) -> torch.Tensor:
        rows = round_rows(x)
        tokens = len(rows)

        def project(
            weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype = torch.float32
        ) -> torch.Tensor:
            return multiply(
                rows, with_bias(pack_nt(weight), bias), torch.empty(tokens, len(weight), dtype=dtype)
            )

        query = rotate(project(query_weight, query_bias), cosines, sines, shape.dim)
        key = rotate(project(key_weight, key_bias), cosines, sines, shape.dim)
        value = project(value_weight, value_bias, torch.bfloat16)
        attended = attend(query, key, value, table, shape)
        out = multiply(attended.out, pack_nt(output_weight), torch.empty(tokens, len(output_weight)))
        ctx.save_for_backward(
            *(rows, query, key, value, attended.out, attended.sums, cosines, sines),
            *(query_weight, key_weight, value_weight, output_weight),
        )
        ctx.settings = (x.shape, table, shape)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx's name
        ctx: Any, d_y: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows, query, key, value, out, sums, cosines, sines, *weights, output_weight = ctx.saved_tensors
        x_shape, table, shape = ctx.settings
        need_x, *need_weights, need_output = ctx.needs_input_grad[:5]
        need_biases = ctx.needs_input_grad[5:8]
        d_y = d_y.reshape(len(rows), -1)
        d_out = matmul_nn(d_y, output_weight)
        d_output_weight = matmul_tn(d_y, out) if need_output else None
        gradients = attend_gradient(d_out, Attended(query, key, value, out, sums), table, shape)
        for gradient in gradients[:2]:
            rotate_back_(gradient, cosines, sines, shape.dim)
        d_weights = [
            matmul_tn(gradient, rows) if need else None
            for gradient, need in zip(gradients, need_weights, strict=True)
        ]
        d_biases = [g.sum(0) if need else None for g, need in zip(gradients, need_biases, strict=True)]
        d_x = None
        if need_x:
            d_x = sum_of_matmul_nn(zip(gradients, weights, strict=True)).view(x_shape)
        return d_x, *d_weights, d_output_weight, *d_biases, None, None, None, None
