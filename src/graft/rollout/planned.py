"""Growing trees: groups of segments below groups of segments, in one round of the torch engine.

A plan says which segments are drawn first, where each ends, and which of those that have ended go on with which new
ones. Nothing is computed twice: a segment that has ended waits in its slot of the key/value cache, and its children go
on from there; the slot is given back as soon as no child will.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from graft.errors import ConfigError, DivergenceError
from graft.kept import Entry, KeptTokens
from graft.rollout.engine import Continuation
from graft.rollout.sampling import SamplingSettings
from graft.rollout.torch_engine import Row, TorchEngine
from graft.types import StopReason, Tokens


@dataclass(eq=False, slots=True)
class Stem:
    """A segment that is to be drawn. Plans may derive from it to keep what they know of it."""

    prefix: int
    """Index of the prompt that its path begins with."""

    key: int
    """Of its random stream."""

    cut: Callable[[int, float], bool]
    """Called with each token and its log-probability: does the segment end here?"""

    logprobs: list[float] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    """What the engine notes while it grows."""

    held: bool = False
    """Whether the state before it is kept until the plan decides about it, also where its path has ended."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A segment that is complete. With `StopReason.CUT` its path can go on."""

    stem: Stem
    segment: Continuation


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of segments that were cut or are held; each is named once, in this call or in a later one."""

    go_on: Sequence[tuple[Stem, Sequence[Stem]]] = ()
    """A segment, and the segments that are drawn after it."""

    dropped: Sequence[Stem] = ()
    """Segments with nothing after them."""

    instead: Sequence[tuple[Stem, Sequence[Stem]]] = ()
    """A segment that was held, and the segments that are drawn in its place: they follow what it followed."""


class Plan(Protocol):
    """Decides while trees grow."""

    def first(self, prefix: int) -> Sequence[Stem]:
        """The segments that follow a prompt."""
        ...

    def ended(self, segments: Sequence[Ended]) -> Decision:
        """Called after each step of the engine in which segments have ended, with all of them."""
        ...


@dataclass(slots=True)
class _Waiting:
    """A slot whose path may go on."""

    row: Row
    stems: list[Stem]
    """Those of its segments of which nothing has been decided."""

    children: list[Stem] = field(default_factory=list)


@torch.no_grad()
def grow_planned(
    engine: TorchEngine,
    prefixes: Sequence[Tokens],
    plan: Plan,
    sampling: SamplingSettings,
    *,
    widest: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Draw what a plan asks for.

    Args:
        engine: whose weights and slots are used.
        prefixes: prompts.
        plan: decides.
        sampling: the distribution; `max_new_tokens` limits a path.
        widest: paths of one prompt that may be open at the same time. A prompt enters when so many slots are free, so
            that none waits for another in a circle.
        progress: called after every step with the number of tokens drawn so far.

    Raises:
        ConfigError: one prompt needs more slots than there are.
        DivergenceError: a log-probability is not finite.
    """
    if widest > engine.slots:
        raise ConfigError(
            f"a tree of this shape keeps {widest} paths open, rollout.slots is {engine.slots}: raise it or branch less"
        )
    if prefixes:
        _Round(engine, plan, sampling, widest).run(prefixes, progress)


class _Round:
    """One call of `grow_planned`."""

    def __init__(self, engine: TorchEngine, plan: Plan, sampling: SamplingSettings, widest: int) -> None:
        self.engine, self.plan, self.sampling, self.widest = engine, plan, sampling, widest
        self.rows: list[Row] = []
        self.waiting: dict[int, _Waiting] = {}  # id of each undecided stem -> where it waits
        self.open: dict[int, int] = {}  # prefix -> its paths that grow or wait
        self.free: list[int] = []
        self.ended: list[Ended] = []
        self.drawn = 0
        self.after_prompts = torch.empty(0)  # logits [prompts, vocabulary]

    def run(self, prefixes: Sequence[Tokens], progress: Callable[[int], None] | None) -> None:
        engine = self.engine
        slots = min(engine.slots, self.widest * len(prefixes))
        self.after_prompts = engine.decoder.begin(prefixes, slots, self.sampling.max_new_tokens)
        engine.vocabulary = self.after_prompts.shape[-1]
        self.free = list(range(slots))[::-1]
        later = list(range(len(prefixes)))[::-1]
        try:
            while self.rows or later or self.ended:
                if self.rows:
                    rows, self.rows = self.rows, []
                    self._draw(rows, engine.step(rows))
                while later and (len(self.open) + 1) * self.widest <= slots:
                    prefix = later.pop()
                    self._begin(prefix, self.plan.first(prefix))
                self._decide()
                if progress is not None:
                    progress(self.drawn)
        finally:
            engine.decoder.end()
        assert not self.waiting, "a plan must decide about every segment that was cut or is held"

    def _begin(self, prefix: int, stems: Sequence[Stem]) -> None:
        """The first tokens of segments that follow a prompt."""
        self._draw([Row(prefix, [], list(stems))], self.after_prompts[prefix][None])

    def _draw(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """The next token of each row's stems; what ends is noted, what parts gets a slot of its own."""
        branches = self.engine.draw(rows, logits, self.sampling)
        copies: list[tuple[int, Row]] = []
        for row, by_token in zip(rows, branches, strict=True):
            slot = row.slot
            for token, stems in by_token.items():
                self.drawn += len(stems)
                branch = Row(row.prefix, [*row.tokens, token], stems)
                stop = self._stop(branch)
                if stop is not None:
                    self._end(branch, stop)
                goes_on = stop in (None, StopReason.CUT)
                waiting = [stem for stem in stems if goes_on or stem.held]
                if not waiting:
                    continue
                if slot >= 0:
                    branch.slot, slot = slot, -1
                else:
                    copies.append((row.slot, branch))
                if stop is None:
                    self.rows.append(branch)
                else:
                    place = _Waiting(branch, waiting)
                    self.waiting |= {id(stem): place for stem in waiting}
            if slot >= 0:
                self.engine.release(slot, self.free)
        for _, branch in copies:
            branch.slot = self.free.pop()
        self.engine.copy([(source, branch.slot) for source, branch in copies])
        self._count_open()

    def _stop(self, branch: Row) -> StopReason | None:
        """Why the segments of a branch end here. All of them have drawn the same tokens, so all end together."""
        token = branch.tokens[-1]
        cuts = {stem.cut(token, stem.logprobs[-1]) for stem in branch.samples}
        assert len(cuts) == 1, "segments with equal tokens were cut differently"
        if token in self.engine.eos:
            return StopReason.EOS
        if len(branch.tokens) >= self.sampling.max_new_tokens:
            return StopReason.LENGTH
        return StopReason.CUT if cuts.pop() else None

    def _end(self, branch: Row, stop: StopReason) -> None:
        for stem in branch.samples:
            logprobs = np.array(stem.logprobs, dtype=np.float32)
            if not np.isfinite(logprobs).all():
                raise DivergenceError(
                    f"sampling with the weights after {self.engine.version} steps: a log-probability is not finite"
                )
            tokens = np.array(branch.tokens[-len(logprobs) :], dtype=np.int32)
            kept = KeptTokens.of(stem.kept, self.engine.vocabulary) if stem.kept else None
            self.ended.append(Ended(stem, Continuation(tokens, logprobs, stop, kept)))

    def _decide(self) -> None:
        """Ask the plan about what has ended; children take over their parent's slot."""
        ended, self.ended = self.ended, []
        if not ended:
            return
        decision = self.plan.ended(ended)
        settled = [(stem, list(children)) for stem, children in decision.go_on]
        settled += [(stem, []) for stem in (*decision.dropped, *(stem for stem, _ in decision.instead))]
        again = [(self.waiting[id(stem)].row, stem, others) for stem, others in decision.instead]
        for stem, children in settled:
            place = self.waiting.pop(id(stem))
            place.stems = [other for other in place.stems if other is not stem]
            place.children += children
            if place.stems:
                continue
            row = place.row
            if place.children:
                self.rows.append(Row(row.prefix, row.tokens, place.children, row.slot))
            else:
                self.engine.release(row.slot, self.free)
        self._draw_again(again)
        self._count_open()

    def _draw_again(self, ended: Sequence[tuple[Row, Stem, Sequence[Stem]]]) -> None:
        """Segments in the place of others, whose slots may be free by now but have not been written to."""
        copies: list[tuple[int, int]] = []
        for row, stem, others in ended:
            before = row.tokens[: -len(stem.logprobs)]
            if before:
                copies.append((row.slot, self.free.pop()))
                self.rows.append(Row(row.prefix, before, list(others), copies[-1][1]))
        self.engine.copy(copies)
        for row, stem, others in ended:
            if len(row.tokens) == len(stem.logprobs):
                self._begin(row.prefix, others)

    def _count_open(self) -> None:
        self.open = {}
        for row in [*self.rows, *(place.row for place in self.waiting.values())]:
            self.open[row.prefix] = self.open.get(row.prefix, 0) + 1
