"""Linear layers with bf16 products and fp32 sums. All three products of y = x W^T round their factors and nothing else:

y  = round(x)  round(W)^T + bias
dx = round(dy) round(W)
dW = round(dy)^T round(x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from graft.kernels.products import last_rounded, matmul_nn, matmul_tn, multiply, pack_nt, with_bias


class Bf16Linear(torch.autograd.Function):
    """y = x W^T + bias for x `[tokens, k]`; see the module's docstring for what is rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rounded: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        # The rounded input is all that the backward pass needs, at half the memory of an fp32 one.
        ctx.save_for_backward(rounded, weight)
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        out = torch.empty(len(x), len(weight), dtype=dtype)
        return multiply(rounded, with_bias(pack_nt(weight), bias), out)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx's name
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rounded, weight = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx = matmul_nn(dy, weight, out=torch.empty(rounded.shape, dtype=x_dtype)) if need_x else None
        dw = matmul_tn(dy, rounded).to(weight.dtype) if need_weight else None
        db = dy.sum(0, dtype=torch.float32).to(bias_dtype) if need_bias else None
        return dx, dw, db, None, None


def bf16_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A linear layer with bf16 products, differentiable once.

    Args:
        x: fp32 or bf16 `[..., k]` on the CPU.
        weight: fp32 or bf16 `[n, k]`.
        bias: `[n]`.
        dtype: of the result, fp32 or bf16; x's unless given.

    Returns:
        `[..., n]`. The gradients have the types of what they belong to.
    """
    y = Bf16Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, last_rounded(x), dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
