"""What a check is, and how its number becomes a verdict. Pure records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from graft.report.doctor.evidence import Evidence

NO_TREES = 'no training trees in trees.jsonl (`report.trees` was "none", or the algorithm samples nothing)'
NO_SCORES = "no sample of training has a score"
NO_PAIRS = "no late group has two samples with a score"
SHARED = "completions of a prompt go on from shared segments here; `distinct_segments` compares these"

MIN_STEPS = 5
"""Fewest steps through which a trend is drawn."""

MIN_GROUPS = 8
"""Fewest groups of which a share is said."""


class Verdict(StrEnum):
    """What to think of a number."""

    OK = "ok"
    LOOK = "look"  # worth a look: may be what the task is like
    BAD = "bad"  # the run spoils its samples or its measurement by it
    NOT_MEASURED = "not measured"  # the run folder cannot tell


@dataclass(frozen=True, slots=True)
class Measured:
    """What a check found."""

    value: float
    """The number that the thresholds are for, in the check's unit."""

    text: str
    """The same for people, with what it was made of."""

    change: str = ""
    """What to change in this case; empty: what the check says in general."""

    details: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers, for scripts."""


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """The run folder cannot tell, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Check:
    """One line of `graft doctor`: what is measured, from where on it is worth a look or bad, and why there."""

    name: str
    title: str
    failure_point: str
    """The row of the table "Failure Points of GRPO" that it measures; empty: none of these."""

    measures: str
    """What the value is, for people."""

    unit: str
    look: float
    bad: float
    """Values from which on the verdict is `look` or `bad`: upwards, or downwards where `bad` is below `look`."""

    reason: str
    """Why these thresholds."""

    change: str
    """What to do about it, with the names of settings in backticks."""

    measure: Callable[[Evidence], Measured | NotMeasured]

    def judge(self, value: float) -> Verdict:
        """The verdict on a value; one that is not a number is bad."""
        if math.isnan(value):
            return Verdict.BAD
        sign = 1 if self.bad >= self.look else -1
        if sign * value >= sign * self.bad:
            return Verdict.BAD
        return Verdict.LOOK if sign * value >= sign * self.look else Verdict.OK

    @property
    def thresholds(self) -> str:
        """For people: `look from 5 %, bad from 20 %`."""
        word = "from" if self.bad >= self.look else "at or below"
        if self.look == self.bad:
            return f"bad {word} {self._number(self.bad)}"
        return f"look {word} {self._number(self.look)}, bad {word} {self._number(self.bad)}"

    def _number(self, value: float) -> str:
        return (
            f"{100 * value:g} %"
            if self.unit == "share"
            else f"{value:g}{f' {self.unit}' if self.unit else ''}"
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """A check and what came of it on one run."""

    check: Check
    verdict: Verdict
    text: str
    """The value for people, or why there is none."""

    value: float | None = None
    change: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def why_no_pairs(run: Evidence) -> str:
    """Why no late group has two scores to compare."""
    if not run.groups:
        return NO_TREES
    return NO_PAIRS if run.graded_groups else NO_SCORES


def why_not_compared(run: Evidence) -> str:
    """Why equal scores of a prompt's samples are no lack of signal."""
    return (
        f"whole samples are not compared within a group: `{run.setting('algorithm.name')}` can learn from samples with "
        "equal scores"
    )


def find(check: Check, evidence: Evidence) -> Finding:
    """Measure and judge."""
    found = check.measure(evidence)
    if isinstance(found, NotMeasured):
        return Finding(check, Verdict.NOT_MEASURED, found.reason)
    verdict = check.judge(found.value)
    return Finding(check, verdict, found.text, found.value, found.change or check.change, found.details)
