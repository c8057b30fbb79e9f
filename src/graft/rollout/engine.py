"""The engine protocol: prefixes in, continuations out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from graft.kept import KeptTokens
from graft.rollout.sampling import SamplingSettings
from graft.types import LogProbs, StopReason, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """What the engine sampled after one prefix."""

    tokens: Tokens
    logprobs: LogProbs
    """In the sampling distribution of the engine, nats."""

    stop: StopReason
    kept: KeptTokens | None = None
    """For truncated sampling: what could have been drawn at each place."""


Finished = Callable[[int, int, Continuation], None]
"""Called with the index of the prefix, the place among its continuations, and the continuation that has ended."""


class Engine(Protocol):
    """Samples continuations from a copy of the policy's weights."""

    path: str
    """Which implementation is in use, for the log and the checkpoint."""

    def grow(
        self,
        prefixes: Sequence[Tokens],
        keys: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        limits: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Continuation]]:
        """Sample `len(keys[i])` continuations of `prefixes[i]`, each prefix computed once.

        Args:
            prefixes: token ids of each state to go on from.
            keys: random stream of every continuation wanted (`sampling.stream_key`).
            sampling: the distribution, and the longest continuation.
            limits: longest continuation of each prefix, at least 1 and no longer than that; None: that of all.
            progress: called after every token with the number drawn so far in this call.
            finished: called when a continuation has ended, while others may still grow.

        Returns:
            The continuations, in the order of `keys`.
        """
        ...

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Take over the policy's current weights; `version` counts optimiser steps."""
        ...

    def drop_weights(self) -> None:
        """Give their memory back until the next `load_weights`."""
        ...
