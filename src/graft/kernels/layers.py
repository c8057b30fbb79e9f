"""RMS norm and gated MLP for training: one pass over memory each, and bf16 for what the backward pass needs."""

from __future__ import annotations

from typing import Any

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
)


class RmsNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x²) + ε) for fp32 x `[..., width]`, all in fp32. Keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        out, scales = torch.empty_like(x), torch.empty(rows)
        require_kernels().run("graft_norm", x, weight.detach(), rows, x.shape[-1], epsilon, out, scales)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx's name
        ctx: Any, d_out: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        require_kernels().run(
            "graft_norm_gradient",
            d_out.contiguous(),
            x,
            weight.detach(),
            scales,
            len(scales),
            x.shape[-1],
            d_x,
            d_weight,
        )
        need_x, need_weight, _ = ctx.needs_input_grad
        return d_x if need_x else None, d_weight if need_weight else None, None


class GatedMlp(torch.autograd.Function):
    """y = (silu(x Wg^T) ⊙ x Wu^T) Wd^T with bf16 products and fp32 sums.

    Gate and up are kept in bf16; their product is computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
    ) -> torch.Tensor:
        rows = round_rows(x)
        tokens, inner = len(rows), len(gate_weight)
        gate, up, hidden = (bf16_rows(tokens, inner) for _ in range(3))
        multiply(rows, pack_nt(gate_weight), gate)
        multiply(rows, pack_nt(up_weight), up)
        require_kernels().run("graft_gate", gate, up, tokens, inner, gate.stride(0), hidden)
        out = multiply(hidden, pack_nt(down_weight), torch.empty(tokens, len(down_weight)))
        ctx.save_for_backward(rows, gate, up, gate_weight, up_weight, down_weight)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx's name
        ctx: Any, d_out: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        need_x, need_gate, need_up, need_down = ctx.needs_input_grad
        tokens, inner = gate.shape
        d_out = d_out.reshape(tokens, -1)
        d_hidden = matmul_nn(d_out, down_weight)
        d_gate, d_up, hidden = (bf16_rows(tokens, inner) for _ in range(3))
        require_kernels().run(
            "graft_gate_gradient",
            *(d_hidden, gate, up, tokens, inner, gate.stride(0), d_gate, d_up, hidden, hidden.stride(0)),
        )
        del d_hidden
        d_down_weight = matmul_tn(d_out, hidden) if need_down else None
        del hidden
        d_gate_weight = matmul_tn(d_gate, rows) if need_gate else None
        d_up_weight = matmul_tn(d_up, rows) if need_up else None
        d_x = None
        if need_x:
            d_x = sum_of_matmul_nn([(d_gate, gate_weight), (d_up, up_weight)]).view(ctx.shape)
        return d_x, d_gate_weight, d_up_weight, d_down_weight
