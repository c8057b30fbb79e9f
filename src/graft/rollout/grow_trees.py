"""Prompts -> trees with groups at every prefix: what is drawn next, and from which candidates a path goes on.

Cuts and scores belong to later stages; they come in as callables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from graft.rollout.engine import Continuation
from graft.rollout.planned import Decision, Ended, Stem, grow_planned
from graft.rollout.sampling import SamplingSettings, stream_key, uniforms
from graft.rollout.torch_engine import TorchEngine
from graft.tree import ROOT, Kind, Tree
from graft.types import Prompt, Purpose, StopReason

SURVIVOR = 2**32
"""Stands for a place no candidate has, in the key of the number that chooses among them."""


class Cutting(Protocol):
    """Finds the ends of segments while a path grows."""

    def feed(self, token: int, logprob: float | None) -> bool:
        """Take the next token; whether a boundary lies after it."""
        ...

    def fork(self) -> Cutting:
        """A second path that goes on from here."""
        ...

    def last_kind(self, stop: StopReason | None) -> Kind:
        """What the newest segment is if it stops so."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """How a tree branches."""

    branching: Sequence[int]
    """Candidates at each depth. Those of the last depth are drawn to the end of the completion."""

    survivors: Literal["all", "sample", "best", "softmax"]
    """Which candidates of a group the tree goes on from: all, or one: any, that with the best score, or one drawn from
    a softmax of the scores."""

    temperature: float = 1.0
    """Of the softmax."""

    @property
    def widest(self) -> int:
        """Paths of one prompt that may be open at the same time."""
        return math.prod(self.branching) if self.survivors == "all" else max(self.branching)


Score = Callable[[Sequence[tuple[Tree, Sequence[int]]]], Sequence[Sequence[float]]]
"""Groups of siblings, each a tree and its nodes -> a score for each sibling."""


def grow_trees(
    engine: TorchEngine,
    prompts: Sequence[Prompt],
    *,
    shape: Shape,
    begin: Callable[[Prompt], Cutting],
    score: Score,
    sampling: SamplingSettings,
    seed: int,
    step: int,
    attempts: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Tree]:
    """One tree a prompt, a group of candidates at each prefix that it goes on from.

    Args:
        engine: what samples.
        prompts: the roots.
        shape: how the trees branch.
        begin: the cutting of a prompt's completions.
        score: asked where the choice of a survivor depends on scores, about all groups that ended together.
        sampling: the distribution; `max_new_tokens` limits a path.
        seed: of the run; with step, row, attempt and path it keys the random streams.
        step: optimiser step.
        attempts: how often each prompt's row was drawn in this step before; None: never.
        progress: see `Engine.grow`.

    Nodes stand in the order in which their groups were complete, which does not depend on what else is sampled.
    """
    plan = _TreePlan(prompts, shape, begin, score, (seed, step), attempts or [0] * len(prompts))
    grow_planned(engine, [p.tokens for p in prompts], plan, sampling, widest=shape.widest, progress=progress)
    return plan.trees


@dataclass(eq=False, slots=True)
class _Candidate(Stem):
    """A segment of a group."""

    path: tuple[int, ...] = ()
    """Place in each group from the prompt on, its own last."""

    cutting: Cutting | None = None
    segment: Continuation | None = None


@dataclass(eq=False, slots=True)
class _Group:
    """Candidates that continue one node."""

    prefix: int
    parent: int
    """Node of the tree."""

    candidates: list[_Candidate] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return all(candidate.segment is not None for candidate in self.candidates)


class _TreePlan:
    """Implements `planned.Plan`."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        shape: Shape,
        begin: Callable[[Prompt], Cutting],
        score: Score,
        stream: tuple[int, int],
        attempts: Sequence[int],
    ) -> None:
        self.trees = [Tree(prompt) for prompt in prompts]
        self._prompts, self._shape, self._begin, self._score, self._stream = (
            prompts,
            shape,
            begin,
            score,
            stream,
        )
        self._attempts = attempts
        self._groups: dict[int, _Group] = {}  # id of a candidate -> its group

    def first(self, prefix: int) -> Sequence[Stem]:
        """The group that follows a prompt."""
        return self._open(prefix, ROOT, (), self._begin(self._prompts[prefix]))

    def ended(self, segments: Sequence[Ended]) -> Decision:
        """Hang complete groups into their trees and go on from their survivors."""
        touched: dict[int, _Group] = {}
        for ended in segments:
            group = self._groups[id(ended.stem)]
            assert isinstance(ended.stem, _Candidate)
            ended.stem.segment = ended.segment
            touched[id(group)] = group
        complete = [group for group in touched.values() if group.complete]
        for group in complete:
            self._hang(group)
        go_on: list[tuple[Stem, Sequence[Stem]]] = []
        dropped: list[Stem] = []
        for group, survivors in zip(complete, self._survivors(complete), strict=True):
            for place, candidate in enumerate(group.candidates):
                del self._groups[id(candidate)]
                assert candidate.segment is not None
                if candidate.segment.stop is not StopReason.CUT:
                    continue
                if place not in survivors:
                    dropped.append(candidate)
                    continue
                assert candidate.cutting is not None
                children = self._open(group.prefix, group.nodes[place], candidate.path, candidate.cutting)
                go_on.append((candidate, children))
        return Decision(go_on, dropped)

    def _open(
        self, prefix: int, parent: int, path: tuple[int, ...], cutting: Cutting
    ) -> Sequence[_Candidate]:
        """The group of candidates that continues a node."""
        depth, branching = len(path), self._shape.branching
        last = depth == len(branching) - 1
        group = _Group(prefix, parent)
        for place in range(branching[depth]):
            own = cutting.fork()
            candidate = _Candidate(
                prefix,
                self._key(prefix, (*path, place)),
                _never if last else own.feed,
                path=(*path, place),
                cutting=None if last else own,
            )
            group.candidates.append(candidate)
            self._groups[id(candidate)] = group
        return group.candidates

    def _key(self, prefix: int, path: Sequence[int]) -> int:
        seed, step = self._stream
        row, attempt = self._prompts[prefix].row, self._attempts[prefix]
        return stream_key(seed, Purpose.TRAIN, step, row, attempt, *path)

    def _hang(self, group: _Group) -> None:
        tree = self.trees[group.prefix]
        number = tree.new_group()
        for candidate in group.candidates:
            segment = candidate.segment
            assert segment is not None
            if candidate.cutting is not None:
                kind = candidate.cutting.last_kind(segment.stop)
            else:
                kind = Kind.ANSWER if segment.stop is StopReason.EOS else Kind.THOUGHT
            node = tree.add(
                group.parent,
                segment.tokens,
                segment.logprobs,
                group=number,
                kind=kind,
                stop=segment.stop,
                kept=segment.kept,
            )
            group.nodes.append(node)

    def _survivors(self, groups: Sequence[_Group]) -> list[set[int]]:
        """The places of each group that the tree goes on from."""
        how = self._shape.survivors
        if how == "all":
            return [set(range(len(group.candidates))) for group in groups]
        if how == "sample":
            return [{int(self._uniform(group) * len(group.candidates))} for group in groups]
        scores = self._score([(self.trees[group.prefix], group.nodes) for group in groups])
        if how == "best":
            return [{max(range(len(own)), key=own.__getitem__)} for own in scores]
        return [
            {draw_softmax(own, self._shape.temperature, self._uniform(group))}
            for group, own in zip(groups, scores, strict=True)
        ]

    def _uniform(self, group: _Group) -> float:
        path = group.candidates[0].path[:-1]
        key = self._key(group.prefix, (*path, SURVIVOR))
        return float(uniforms(np.array([key], dtype=np.uint64), np.zeros(1, dtype=np.int64))[0])


def draw_softmax(scores: Sequence[float], temperature: float, uniform: float) -> int:
    """Index drawn with probability proportional to exp(score / temperature), by a number in [0, 1)."""
    logits = np.array(scores, dtype=np.float64) / temperature
    weights = np.exp(logits - logits.max())
    return min(
        int(np.searchsorted(np.cumsum(weights / weights.sum()), uniform, side="right")), len(scores) - 1
    )


def _never(_token: int, _logprob: float) -> bool:
    return False
