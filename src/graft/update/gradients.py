"""Gradients that stay in one place for a whole step, and backward passes that add to them there.

Autograd hands each weight's gradient over as a tensor of its own. Of an embedding that is also the LM head there are
three at once: the head's share, the embedding's, and the sum of earlier micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def make_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of zero, to which micro-batches add.

    Made before the first micro-batch they lie side by side; those that autograd leaves behind take their places among
    activations, which leaves holes.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def gradient_place(weight: Tensor) -> Tensor | None:
    """Where a backward pass adds the weight's gradient itself, instead of handing it to autograd; None: nowhere.

    The weight must have a gradient, of fp32 or fp64: sums in fewer bits would lose small terms. What comes out is that
    of `Tensor.backward`; `torch.autograd.grad` would change the weight's gradient and return none.
    """
    return weight.grad if weight.is_leaf and weight.dtype in (torch.float32, torch.float64) else None


def embed_in_place(module: nn.Module) -> None:
    """Let a plain embedding layer's backward pass add to its weight's `gradient_place`."""
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        module.forward = functools.partial(_embed, module)  # pyright: ignore[reportAttributeAccessIssue]


def _embed(module: nn.Embedding, tokens: Tensor) -> Tensor:
    if module.weight.device.type != "cpu":  # there index_add_ adds in any order
        return nn.Embedding.forward(module, tokens)
    return _Embed.apply(tokens, module.weight, module.padding_idx)  # pyright: ignore[reportReturnType]


class _Embed(torch.autograd.Function):
    """weight[tokens]; the padding token's row gets no gradient, as in torch."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.padding = padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx's name
        ctx: Any, d_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        rows, added = tokens.flatten(), d_out.flatten(0, -2)
        if ctx.padding is not None:
            trained = (rows != ctx.padding).nonzero()[:, 0]
            rows, added = rows[trained], added[trained]
        place = gradient_place(weight)
        d_weight = torch.zeros_like(weight) if place is None else place
        d_weight.index_add_(0, rows, added)
        return None, d_weight if place is None else None, None
