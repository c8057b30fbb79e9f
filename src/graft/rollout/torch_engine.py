"""The PyTorch engine: a batch of slots in which finished samples leave and waiting ones enter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from graft.rollout.decoder import Decoder
from graft.rollout.engine import Continuation, Finished
from graft.rollout.sampling import SamplingSettings, draw, uniforms
from graft.types import StopReason, Tokens


@dataclass(slots=True)
class _Row:
    """One sample while it grows."""

    prefix: int
    place: int  # index among the prefix's continuations
    key: int
    slot: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[np.ndarray] = field(default_factory=list)


class TorchEngine:
    """Engine over a `Decoder`."""

    def __init__(self, decoder: Decoder, *, slots: int, eos_ids: Sequence[int]) -> None:
        """
        Args:
            decoder: model-specific forward with its key/value cache.
            slots: samples that grow side by side.
            eos_ids: tokens that end a sample.
        """
        self.decoder = decoder
        self.path = decoder.name
        self.version = -1
        self._slots = slots
        self._eos = frozenset(int(i) for i in eos_ids)

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Take over the policy's current weights."""
        self.decoder.load_weights(state)
        self.version = version

    @torch.no_grad()
    def grow(
        self,
        prefixes: Sequence[Tokens],
        keys: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[list[Continuation]]:
        """Sample continuations; see `Engine.grow`."""
        results: list[list[Continuation | None]] = [[None] * len(k) for k in keys]
        waiting = [_Row(i, j, key, -1) for i, own in enumerate(keys) for j, key in enumerate(own)][::-1]
        slots = min(self._slots, len(waiting))
        if not slots:
            return [[] for _ in keys]
        first_logits = self.decoder.begin(prefixes, slots, sampling.max_new_tokens)
        free = list(range(slots))[::-1]
        rows: list[_Row] = []
        drawn = 0
        try:
            while rows or waiting:
                rows = self._step(rows, sampling) if rows else rows
                drawn += len(rows)
                for row in [r for r in rows if self._finished(r, sampling, results, finished)]:
                    free.append(row.slot)
                rows = [r for r in rows if results[r.prefix][r.place] is None]
                while free and waiting:  # again, where samples end at their first token
                    entering = []
                    while free and waiting:
                        row = waiting.pop()
                        row.slot = free.pop()
                        entering.append(row)
                    self._draw(entering, first_logits[[r.prefix for r in entering]], sampling)
                    for row in entering:
                        if self._finished(row, sampling, results, finished):
                            free.append(row.slot)
                        else:
                            rows.append(row)
                    drawn += len(entering)
                if progress is not None:
                    progress(drawn)
        finally:
            self.decoder.end()
        return [[c for c in own if c is not None] for own in results]

    def _step(self, rows: list[_Row], sampling: SamplingSettings) -> list[_Row]:
        """Append each row's last token to the cache and draw the next."""
        logits = self.decoder.step(
            np.array([r.slot for r in rows], dtype=np.int32),
            np.array([r.prefix for r in rows], dtype=np.int32),
            np.array([r.tokens[-1] for r in rows], dtype=np.int32),
            np.array([len(r.tokens) - 1 for r in rows], dtype=np.int32),
        )
        self._draw(rows, logits, sampling)
        return rows

    def _draw(self, rows: Sequence[_Row], logits: torch.Tensor, sampling: SamplingSettings) -> None:
        keys = np.array([r.key for r in rows], dtype=np.uint64)
        uniform = uniforms(keys, np.array([len(r.tokens) for r in rows]))
        tokens, logprobs, kept = self._sample(logits, uniform, sampling)
        for i, row in enumerate(rows):
            row.tokens.append(int(tokens[i]))
            row.logprobs.append(float(logprobs[i]))
            if kept is not None:
                row.kept.append(kept[i].nonzero()[:, 0].to(torch.int32).cpu().numpy())

    def _sample(
        self, logits: torch.Tensor, uniform: np.ndarray, sampling: SamplingSettings
    ) -> tuple[Sequence[int], Sequence[float], torch.Tensor | None]:
        fused = getattr(self.decoder, "sample", None)
        if fused is not None and not sampling.truncated:
            tokens, logprobs = fused(logits, uniform, sampling.temperature)
            return tokens.tolist(), logprobs.tolist(), None
        tokens, logprobs, kept = draw(logits, torch.from_numpy(uniform), sampling)
        return tokens.tolist(), logprobs.tolist(), kept

    def _finished(
        self,
        row: _Row,
        sampling: SamplingSettings,
        results: list[list[Continuation | None]],
        finished: Finished | None,
    ) -> bool:
        """Store the row's continuation if its last token ends it."""
        if row.tokens[-1] in self._eos:
            stop = StopReason.EOS
        elif len(row.tokens) >= sampling.max_new_tokens:
            stop = StopReason.LENGTH
        else:
            return False
        continuation = Continuation(
            tokens=np.array(row.tokens, dtype=np.int32),
            logprobs=np.array(row.logprobs, dtype=np.float32),
            stop=stop,
            kept=tuple(row.kept) if row.kept else None,
        )
        results[row.prefix][row.place] = continuation
        if finished is not None:
            finished(row.prefix, row.place, continuation)
        return True
