"""The weights that samples are drawn with, where they are older than those in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RolloutWeights:
    """Copies of the parameters from when the policy that samples was last refreshed."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """
        Args:
            parameters: everything that trains, by name.
        """
        self._parameters = dict(parameters)
        self.tensors: Mapping[str, Tensor] = {}
        """By name; empty before the first refresh."""

    def refresh(self) -> None:
        """Keep a copy of the parameters as they are now."""
        self.tensors = {name: own.detach().clone() for name, own in self._parameters.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the copies of a checkpoint.

        Raises:
            KeyError: a parameter has none.
        """
        self.tensors = {name: tensors[name].to(own.device) for name, own in self._parameters.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the parameters hold the older values, to the bit, and the copies the newer ones."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Copies instead of other storage: kernels remember packed weights by tensor and version."""
        for name, parameter in self._parameters.items():
            newer = parameter.clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(newer)
