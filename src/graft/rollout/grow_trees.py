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
from graft.tree import ROOT, Grown, Kind, Tree
from graft.types import Prompt, Purpose, StopReason

NOT_JUDGED = -1e9
"""Stands for a missing score where a survivor is chosen: below every other."""

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

    draws: int = 1
    """Draws of a group at most: while its scores are all equal it is drawn anew, from the same state."""

    separately: bool = False
    """Whether candidates that go on and those that end the completion are compared apart from each other."""

    @property
    def widest(self) -> int:
        """Paths of one prompt that may be open at the same time."""
        return math.prod(self.branching) if self.survivors == "all" else max(self.branching)


Score = Callable[[Sequence[tuple[Tree, Sequence[int]]]], Sequence[Sequence[float | None]]]
"""Groups of siblings, each a tree and its nodes -> a score for each sibling; None: it could not be judged. The tree
holds the path to the siblings and nothing else."""


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
) -> list[Grown]:
    """One tree a prompt, a group of candidates at each prefix that it goes on from.

    Args:
        engine: what samples.
        prompts: the roots.
        shape: how the trees branch.
        begin: the cutting of a prompt's completions.
        score: asked where the choice of a survivor or another draw depends on scores, about all groups that ended
            together.
        sampling: the distribution; `max_new_tokens` limits a path.
        seed: of the run; with step, row, attempt and path it keys the random streams.
        step: optimiser step.
        attempts: how often each prompt's row was drawn in this step before; None: never.
        progress: see `Engine.grow`.

    Nodes stand in the order in which their groups were complete, which does not depend on what else is sampled.
    """
    plan = _TreePlan(prompts, shape, begin, score, (seed, step), attempts or [0] * len(prompts))
    grow_planned(engine, [p.tokens for p in prompts], plan, sampling, widest=shape.widest, progress=progress)
    return plan.grown


@dataclass(eq=False, slots=True)
class _Candidate(Stem):
    """A segment of a group."""

    path: tuple[int, ...] = ()
    """Its number in each group from the prompt on, its own last, counted over all draws of the group."""

    cutting: Cutting | None = None
    segment: Continuation | None = None


@dataclass(eq=False, slots=True)
class _Group:
    """Candidates that continue one node."""

    prefix: int
    parent: int
    """Node of the tree."""

    path: tuple[int, ...]
    """That of the node."""

    cutting: Cutting
    """As it stands at the node's end."""

    candidates: list[_Candidate] = field(default_factory=list)
    """Of the newest draw."""

    nodes: list[int] = field(default_factory=list)
    draws: int = 0

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
        self.grown = [Grown(Tree(prompt)) for prompt in prompts]
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
        return self._draw(_Group(prefix, ROOT, (), self._begin(self._prompts[prefix])))

    def ended(self, segments: Sequence[Ended]) -> Decision:
        """Hang complete groups into their trees and go on from their survivors, or draw them anew."""
        touched: dict[int, _Group] = {}
        for ended in segments:
            group = self._groups.pop(id(ended.stem))
            assert isinstance(ended.stem, _Candidate)
            ended.stem.segment = ended.segment
            touched[id(group)] = group
        complete = [group for group in touched.values() if group.complete]
        decision = _Decisions()
        for group, scores in zip(complete, self._scores(complete), strict=True):
            if self._draws_left(group) and not self._differ(group, scores):
                self._throw_away(group)
                carrier, *others = group.candidates
                decision.dropped += others
                decision.instead.append((carrier, self._draw(group)))
            else:
                self._hang(group)
                self._go_on(group, self._survivors(group, scores), decision)
        return Decision(decision.go_on, decision.dropped, decision.instead)

    def _draw(self, group: _Group) -> Sequence[_Candidate]:
        """New candidates for a group."""
        depth, branching = len(group.path), self._shape.branching
        last, group.candidates = depth == len(branching) - 1, []
        group.draws += 1
        for place in range(branching[depth]):
            own = group.cutting.fork()
            path = (*group.path, (group.draws - 1) * branching[depth] + place)
            candidate = _Candidate(
                group.prefix,
                self._key(group.prefix, path),
                _never if last else own.feed,
                path=path,
                cutting=None if last else own,
                held=self._draws_left(group),
            )
            group.candidates.append(candidate)
            self._groups[id(candidate)] = group
        return group.candidates

    def _draws_left(self, group: _Group) -> bool:
        """Whether it may be drawn anew. One candidate alone has no signal in any draw."""
        return self._shape.branching[len(group.path)] > 1 and group.draws < self._shape.draws

    def _throw_away(self, group: _Group) -> None:
        grown = self.grown[group.prefix]
        grown.groups_redrawn += 1
        grown.tokens_redrawn += sum(len(segment.tokens) for _, segment in _segments(group))

    def _go_on(self, group: _Group, survivors: set[int], decision: _Decisions) -> None:
        """From the survivors that were cut. What is held or was cut otherwise is dropped."""
        for place, (candidate, segment) in enumerate(_segments(group)):
            cut = segment.stop is StopReason.CUT
            if cut and place in survivors:
                assert candidate.cutting is not None
                below = _Group(group.prefix, group.nodes[place], candidate.path, candidate.cutting)
                decision.go_on.append((candidate, self._draw(below)))
            elif cut or candidate.held:
                decision.dropped.append(candidate)

    def _key(self, prefix: int, path: Sequence[int]) -> int:
        seed, step = self._stream
        row, attempt = self._prompts[prefix].row, self._attempts[prefix]
        return stream_key(seed, Purpose.TRAIN, step, row, attempt, *path)

    def _hang(self, group: _Group) -> None:
        group.nodes = _add_group(self.grown[group.prefix].tree, group.parent, group)

    def _scores(self, groups: Sequence[_Group]) -> list[Sequence[float | None]]:
        """Of the candidates of each group; nothing where no decision hangs on them."""
        chosen_by_score = self._shape.survivors in ("best", "softmax")
        asked = [group for group in groups if chosen_by_score or self._draws_left(group)]
        drafts = [self._draft(group) for group in asked]
        found = dict(zip(map(id, asked), self._score(drafts) if drafts else (), strict=True))
        return [found.get(id(group), ()) for group in groups]

    def _differ(self, group: _Group, scores: Sequence[float | None]) -> bool:
        """Whether a group has signal: two candidates that are compared and whose scores are not equal. Scores that are
        missing say nothing."""
        known = {
            (self._shape.separately and segment.stop is not StopReason.CUT, score)
            for (_, segment), score in zip(_segments(group), scores, strict=True)
            if score is not None
        }
        return len(known) > len({apart for apart, _ in known})

    def _draft(self, group: _Group) -> tuple[Tree, list[int]]:
        """A tree of the path to a group, and the group."""
        whole = self.grown[group.prefix].tree
        tree, parent = Tree(whole.prompt), ROOT
        for node in map(whole.nodes.__getitem__, whole.path(group.parent)[1:]):
            parent = tree.add(
                parent,
                node.tokens,
                node.engine_logprobs,
                group=tree.new_group(),
                kind=node.kind,
                stop=node.stop,
                kept=node.kept,
            )
        return tree, _add_group(tree, parent, group)

    def _survivors(self, group: _Group, scores: Sequence[float | None]) -> set[int]:
        """The places of a group that the tree goes on from."""
        how, number = self._shape.survivors, len(group.candidates)
        if how == "all":
            return set(range(number))
        known = [NOT_JUDGED if score is None else score for score in scores]
        if how == "sample":
            chosen = int(self._uniform(group) * number)
        elif how == "best":
            chosen = max(range(number), key=known.__getitem__)
        else:
            chosen = draw_softmax(known, self._shape.temperature, self._uniform(group))
        self.grown[group.prefix].survivors.append(group.nodes[chosen])
        return {chosen}

    def _uniform(self, group: _Group) -> float:
        key = self._key(group.prefix, (*group.path, SURVIVOR))
        return float(uniforms(np.array([key], dtype=np.uint64), np.zeros(1, dtype=np.int64))[0])


@dataclass(slots=True)
class _Decisions:
    """A `Decision` in the making."""

    go_on: list[tuple[Stem, Sequence[Stem]]] = field(default_factory=list)
    dropped: list[Stem] = field(default_factory=list)
    instead: list[tuple[Stem, Sequence[Stem]]] = field(default_factory=list)


def _segments(group: _Group) -> list[tuple[_Candidate, Continuation]]:
    """Candidates of a complete group and what was drawn for them."""
    return [(own, own.segment) for own in group.candidates if own.segment is not None]


def _add_group(tree: Tree, parent: int, group: _Group) -> list[int]:
    """Hang the candidates of a complete group below a node."""
    number = tree.new_group()
    nodes = []
    for _, segment in _segments(group):
        node = tree.add(
            parent,
            segment.tokens,
            segment.logprobs,
            group=number,
            kind=Kind.ANSWER if segment.stop is StopReason.EOS else Kind.THOUGHT,
            stop=segment.stop,
            kept=segment.kept,
        )
        nodes.append(node)
    return nodes


def draw_softmax(scores: Sequence[float], temperature: float, uniform: float) -> int:
    """Index drawn with probability proportional to exp(score / temperature), by a number in [0, 1)."""
    logits = np.array(scores, dtype=np.float64) / temperature
    weights = np.exp(logits - logits.max())
    return min(
        int(np.searchsorted(np.cumsum(weights / weights.sum()), uniform, side="right")), len(scores) - 1
    )


def _never(_token: int, _logprob: float) -> bool:
    return False
