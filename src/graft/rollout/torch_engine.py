"""The PyTorch engine: a batch of slots in which finished samples leave and waiting ones enter.

Samples of one prefix stay together as long as they draw the same tokens: the network computes them once, and each draws
with its own random numbers. Where they part, the keys and values so far are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from graft.errors import DivergenceError
from graft.kept import Entry, KeptTokens, entry_of
from graft.rollout.decoder import Decoder
from graft.rollout.engine import Continuation, Finished
from graft.rollout.sampling import SamplingSettings, uniforms
from graft.types import StopReason, Tokens


@dataclass(slots=True)
class _Sample:
    """One sample while it grows."""

    prefix: int
    place: int  # index among the prefix's continuations
    key: int
    logprobs: list[float] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """Samples of one prefix that have drawn the same tokens so far; the network computes them once."""

    prefix: int
    tokens: list[int]
    samples: list[Any]
    """What draws: with a key, and lists that its log-probabilities and kept sets are added to."""

    slot: int = -1
    """Of the key/value cache; -1: none yet."""


Store = Callable[[_Sample, Continuation], None]


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
        self.slots = slots
        self.vocabulary = 0
        self.eos = frozenset(int(i) for i in eos_ids)

    def load_weights(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Take over the policy's current weights."""
        self.decoder.load_weights(state)
        self.version = version

    def drop_weights(self) -> None:
        """Give the memory of weights and caches back until the next `load_weights`."""
        self.decoder.drop_weights()
        self.version = -1

    @torch.no_grad()
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
        """Sample continuations; see `Engine.grow`.

        Raises:
            DivergenceError: a log-probability is not finite: the weights are of no use.
        """
        results: list[list[Continuation | None]] = [[None] * len(k) for k in keys]

        def store(sample: _Sample, continuation: Continuation) -> None:
            results[sample.prefix][sample.place] = continuation
            if finished is not None:
                finished(sample.prefix, sample.place, continuation)

        waiting = self._groups(keys)[::-1]
        slots = min(self.slots, sum(len(own) for own in keys))
        if not slots:
            return [[] for _ in keys]
        limits = [sampling.max_new_tokens] * len(prefixes) if limits is None else limits
        first_logits = self.decoder.begin(prefixes, slots, max(limits))
        self.vocabulary = first_logits.shape[-1]
        free = list(range(slots))[::-1]
        rows: list[Row] = []
        drawn = growing = 0
        try:
            while rows or waiting:
                if rows:
                    drawn += growing
                    branches = self.draw(rows, self.step(rows), sampling)
                    rows = self._go_on(rows, branches, free, limits, store)
                growing = sum(len(row.samples) for row in rows)
                # Samples grow into different rows, at worst each into one of its own.
                while waiting and growing + len(waiting[-1].samples) <= slots:
                    entering = waiting.pop()
                    drawn += len(entering.samples)
                    branches = self.draw([entering], first_logits[entering.prefix][None], sampling)
                    rows += self._go_on([entering], branches, free, limits, store)
                    growing = sum(len(row.samples) for row in rows)
                if progress is not None:
                    progress(drawn)
        finally:
            self.decoder.end()
        return [[c for c in own if c is not None] for own in results]

    def _groups(self, keys: Sequence[Sequence[int]]) -> list[Row]:
        """The samples of each prefix, cut where there are more than slots."""
        return [
            Row(i, [], [_Sample(i, j, own[j]) for j in range(start, min(start + self.slots, len(own)))])
            for i, own in enumerate(keys)
            for start in range(0, len(own), self.slots)
        ]

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """Append each row's last token to the cache."""
        return self.decoder.step(
            np.array([r.slot for r in rows], dtype=np.int32),
            np.array([r.prefix for r in rows], dtype=np.int32),
            np.array([r.tokens[-1] for r in rows], dtype=np.int32),
            np.array([len(r.tokens) - 1 for r in rows], dtype=np.int32),
        )

    def draw(
        self, rows: Sequence[Row], logits: torch.Tensor, sampling: SamplingSettings
    ) -> list[dict[int, list[Any]]]:
        """Each sample's next token: for every row, token -> the samples that drew it."""
        drawing = [(index, sample) for index, row in enumerate(rows) for sample in row.samples]
        if len(drawing) > len(rows):
            logits = logits[[index for index, _ in drawing]]
        keys = np.array([sample.key for _, sample in drawing], dtype=np.uint64)
        uniform = uniforms(keys, np.array([len(rows[index].tokens) for index, _ in drawing]))
        tokens, logprobs, kept = self.decoder.draw(logits, uniform, sampling)
        masks = None if kept is None else kept.cpu().numpy()
        branches: list[dict[int, list[Any]]] = [{} for _ in rows]
        for i, (index, sample) in enumerate(drawing):
            sample.logprobs.append(float(logprobs[i]))
            if masks is not None:
                sample.kept.append(entry_of(masks[i]))
            branches[index].setdefault(int(tokens[i]), []).append(sample)
        return branches

    def _go_on(
        self,
        rows: Sequence[Row],
        branches: Sequence[dict[int, list[Any]]],
        free: list[int],
        limits: Sequence[int],
        store: Store,
    ) -> list[Row]:
        """Finish what has ended; the first of a row's other branches keeps its slot, the rest get copies."""
        going: list[Row] = []
        sources: list[int] = []
        copies: list[Row] = []
        for row, by_token in zip(rows, branches, strict=True):
            slot = row.slot
            for token, samples in by_token.items():
                branch = Row(row.prefix, [*row.tokens, token], samples)
                if self._finished(branch, limits[row.prefix], store):
                    continue
                going.append(branch)
                if slot >= 0:
                    branch.slot, slot = slot, -1
                else:
                    copies.append(branch)
                    sources.append(row.slot)
            if slot >= 0:
                self.release(slot, free)
        for branch in copies:
            branch.slot = free.pop()
        self.copy([(source, branch.slot) for source, branch in zip(sources, copies, strict=True)])
        return going

    def release(self, slot: int, free: list[int]) -> None:
        """Nothing goes on from a slot: others may take it."""
        self.decoder.release(slot)
        free.append(slot)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Let slots go on from where others stand: pairs of source and target.

        A row that comes from its prefix alone (-1) has nothing to copy. All sources are read before a target is
        written, so that a slot that was just freed may be both.
        """
        copied = [pair for pair in pairs if pair[0] >= 0]
        if copied:
            self.decoder.copy_slots(*np.array(copied, dtype=np.int32).T)

    def _finished(self, row: Row, limit: int, store: Store) -> bool:
        """Store the continuations if the row's last token ends them, or `limit` tokens are drawn."""
        if row.tokens[-1] in self.eos:
            stop = StopReason.EOS
        elif len(row.tokens) >= limit:
            stop = StopReason.LENGTH
        else:
            return False
        tokens = np.array(row.tokens, dtype=np.int32)
        for sample in row.samples:
            logprobs = np.array(sample.logprobs, dtype=np.float32)
            if not np.isfinite(logprobs).all():
                raise DivergenceError(
                    f"sampling with the weights after {self.version} steps: a log-probability is "
                    f"{logprobs[~np.isfinite(logprobs)][0]}"
                )
            kept = KeptTokens.of(sample.kept, self.vocabulary) if sample.kept else None
            store(sample, Continuation(tokens, logprobs, stop, kept))
        return True
