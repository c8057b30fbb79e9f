"""Prompts -> graded trees: the rounds of sampling and grading of one step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graft.tree import Tree
from graft.types import Grade, Prompt

LEAST_SHARE = 1 / 8
"""Dynamic sampling draws no more than so many times what is missing, however few groups had signal so far."""


@dataclass(slots=True)
class Drawn:
    """Trees and what belongs to them, in the order of the prompts."""

    places: list[int] = field(default_factory=list)
    """Of the rows among the training rows."""

    prompts: list[Prompt] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    grades: list[Mapping[int, Grade]] = field(default_factory=list)

    def add(self, place: int, prompt: Prompt, tree: Tree, grades: Mapping[int, Grade]) -> None:
        """One more."""
        self.places.append(place)
        self.prompts.append(prompt)
        self.trees.append(tree)
        self.grades.append(grades)

    def part(self, start: int, stop: int | None) -> Drawn:
        """Some of them, as a slice."""
        return Drawn(
            self.places[start:stop], self.prompts[start:stop], self.trees[start:stop], self.grades[start:stop]
        )

    def entries(self) -> Iterator[tuple[int, Prompt, Tree, Mapping[int, Grade]]]:
        """One by one, as `add` takes them."""
        yield from zip(self.places, self.prompts, self.trees, self.grades, strict=True)

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the engine drew for them."""
        return sum(tree.sampled_tokens for tree in self.trees)


@dataclass(frozen=True, slots=True)
class Collected:
    """What the rounds of one step gave."""

    kept: Drawn
    """What trains; empty when the data has ended."""

    discarded: Drawn
    """Groups whose grades are all equal, and what was drawn beyond the batch."""

    rounds: int


def collect(
    take: Callable[[int], list[int]],
    put_back: Callable[[Sequence[int]], None],
    draw: Callable[[Sequence[int], Sequence[int]], Drawn],
    *,
    wanted: int,
    max_rounds: int,
) -> Collected:
    """Draw prompts until `wanted` of them have groups with signal, or `max_rounds` are over.

    With one round everything that is drawn is kept. Otherwise a group is kept if its **unshaped** grades are not all
    equal, in the order of the prompts. A later round asks for as many prompts as the share kept so far says are
    needed; what is then left over is discarded (its tokens are counted) and its prompts come first next time. If no
    group at all has signal, the first round's are kept; a penalty on length may still tell them apart.

    Args:
        take: the next so many rows; fewer when the data ends.
        put_back: rows that come next time.
        draw: rows, and how often each of them was drawn in this step before, -> trees and grades. A row comes again
            where a step takes more rows than there are, or crosses from one epoch to the next.
        wanted: prompts of a step.
        max_rounds: most rounds of a step.

    Source: DAPO, arXiv:2503.14476, section 3.2.
    """
    if max_rounds == 1:
        places = take(wanted)
        return Collected(draw(places, _attempts(places, Counter())) if places else Drawn(), Drawn(), 1)
    useful, useless, sizes = Drawn(), Drawn(), []
    before: Counter[int] = Counter()
    while len(sizes) < max_rounds and len(useful.trees) < wanted:
        places = take(needed(wanted, len(useful.trees), len(useless.trees)))
        if not places:
            break
        for entry in draw(places, _attempts(places, before)).entries():
            (useful if has_signal(entry[3]) else useless).add(*entry)
        sizes.append(len(places))
    put_back(useful.places[wanted:])
    if sizes and not useful.trees:
        return Collected(useless.part(0, sizes[0]), useless.part(sizes[0], None), len(sizes))
    for entry in useful.part(wanted, None).entries():
        useless.add(*entry)
    return Collected(useful.part(0, wanted), useless, len(sizes))


def _attempts(places: Sequence[int], before: Counter[int]) -> list[int]:
    """How often each row was drawn before; counts them."""
    attempts = []
    for place in places:
        attempts.append(before[place])
        before[place] += 1
    return attempts


def has_signal(grades: Mapping[int, Grade]) -> bool:
    """Whether the scores of a group differ. Those that are missing say nothing."""
    return len({grade.score for grade in grades.values() if grade.score is not None}) > 1


def needed(wanted: int, useful: float, useless: float) -> int:
    """Prompts of the next round, given how many groups had signal and how many had none."""
    missing = wanted - useful
    if useful + useless == 0:
        return math.ceil(missing)
    return math.ceil(missing / max(useful / (useful + useless), LEAST_SHARE))
