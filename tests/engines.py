"""An engine for tests that continues as the test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from graft.rollout.engine import Continuation, Finished
from graft.rollout.sampling import SamplingSettings
from graft.types import Tokens

Plan = Callable[[int, int, Tokens, int], Continuation]
"""Index of the prefix, place among its continuations, the prefix, tokens at most -> the continuation."""


class PlannedEngine:
    """Remembers what it was asked for; hands over every continuation and tells the number of tokens at its end."""

    path = "planned"

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.prefixes: list[list[int]] = []
        self.keys: list[list[int]] = []
        self.sampling: SamplingSettings | None = None

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> None: ...

    def drop_weights(self) -> None: ...

    def grow(
        self,
        prefixes: Sequence[np.ndarray],
        keys: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        limits: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Continuation]]:
        self.prefixes = [prefix.tolist() for prefix in prefixes]
        self.keys = [list(own) for own in keys]
        self.sampling = sampling
        grown = [
            [self._plan(i, j, prefix, limit) for j in range(len(own))]
            for i, (prefix, own, limit) in enumerate(
                zip(prefixes, keys, limits or [sampling.max_new_tokens] * len(prefixes), strict=True)
            )
        ]
        for i, own in enumerate(grown):
            for j, continuation in enumerate(own):
                if finished is not None:
                    finished(i, j, continuation)
        if progress is not None:
            progress(sum(len(continuation.tokens) for own in grown for continuation in own))
        return grown
