"""Linear layers for decoding: a weight is packed once and then serves every token of a round."""

from __future__ import annotations

import functools
from typing import TypeGuard

import torch
from torch import nn

from graft.kernels.library import Engine, Epilogue, Kernels, PackedWeights, activations


class PackedLinears:
    """The linear layers of a model on the CPU, computed by the native kernels. No gradients.

    Only the instances' forward methods change. The layers keep their own weights: some models read them elsewhere.
    """

    def __init__(self, model: nn.Module, kernels: Kernels, engine: Engine) -> None:
        """Take over every plain linear layer.

        Args:
            model: of the engine's type.
            kernels: what multiplies.
            engine: how.
        """
        self._kernels = kernels
        self.engine = engine
        self._inputs: dict[int, torch.Tensor] = {}  # inner dimension -> room for rows
        self._packed: dict[nn.Module, PackedWeights] = {}
        self._layers = [
            module
            for module in model.modules()
            if type(module) is nn.Linear and module.weight.dtype == engine.dtype
        ]
        for layer in self._layers:
            layer.forward = functools.partial(self.multiply, layer)  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def load(self) -> None:
        """Pack the layers' present weights."""
        for layer in self._layers:
            n, k = layer.weight.shape
            before = self._packed.get(layer)
            size = self._kernels.packed_bytes(self.engine, n, k)
            data = torch.zeros(size, dtype=torch.uint8) if before is None else before.data
            bias = None if layer.bias is None else layer.bias.float().contiguous()
            packed = self._packed[layer] = PackedWeights(self.engine, n, k, data, bias)
            self._kernels.pack(packed, layer.weight)

    def holds(self, layer: nn.Module) -> TypeGuard[nn.Linear]:
        """Whether this layer is computed here."""
        return layer in self._packed

    def drop(self) -> None:
        """Give back the memory until the next `load`."""
        self._packed, self._inputs = {}, {}

    def multiply(self, layer: nn.Linear, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x W^T + bias.

        Args:
            layer: whose weight.
            x: `[..., k]`.
            dtype: of the result, fp32 or the engine's type, x's unless given.

        Returns:
            `[..., n]`.
        """
        packed, dtype = self._packed[layer], dtype or x.dtype
        rows = x.reshape(-1, packed.k)
        room = self._inputs.get(packed.k)
        if room is None or len(room) < len(rows):
            room = self._inputs[packed.k] = activations(len(rows), packed.k, self.engine.dtype)
        room[: len(rows)] = rows
        out = torch.empty(len(rows), packed.n, dtype=dtype)
        epilogue = Epilogue.STORE_FP32 if dtype == torch.float32 else Epilogue.STORE_BF16
        self._kernels.product(room, packed, out, epilogue)(len(rows))
        return out.view(*x.shape[:-1], packed.n)
