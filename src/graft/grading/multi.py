"""Several graders, one score: OpenAI's `multi` with its formula, and `weighted`.

A member without a score leaves the whole without one: a formula over an invented 0 would train on our own failure.
Whoever wants OpenAI's zeros makes them in the members (`zero_failures`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from graft.grading.formula import Formula, FormulaValueError
from graft.types import Fault, Grade, Grader, Outcome, Sample, TokenUsage

Combine = Callable[[Mapping[str, float]], float]
"""Scores by key -> the score; raises FormulaValueError where there is none."""


class MultiGrader:
    """Asks all members about each sample and combines their scores; each score is a part of the grade."""

    def __init__(self, members: Mapping[str, Grader], combine: Combine) -> None:
        self._members, self._combine = members, combine

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        """Grade each sample."""
        columns = {key: member(samples) for key, member in self._members.items()}
        return [
            combined({key: grades[place] for key, grades in columns.items()}, self._combine)
            for place in range(len(samples))
        ]


def combined(grades: Mapping[str, Grade], combine: Combine) -> Grade:
    """One grade from several."""
    parts = _parts(grades)
    faults = {fault: text for grade in grades.values() for fault, text in grade.faults.items()}
    usage: dict[str, TokenUsage] = {}
    for grade in grades.values():
        for model, tokens in grade.usage.items():
            usage[model] = usage.get(model, TokenUsage()) + tokens
    whole = Grade(0.0, parts=parts, faults=faults, usage=usage)
    reason = "; ".join(f"{key}: {grade.reason}" for key, grade in grades.items() if grade.reason)
    failed = [grade for grade in grades.values() if grade.failed]
    if failed:
        whole = replace(whole, outcome=failed[0].outcome)
    elif all(grade.outcome is Outcome.UNPARSEABLE for grade in grades.values()):
        whole = replace(whole, outcome=Outcome.UNPARSEABLE)
    scores = {key: grade.score for key, grade in grades.items() if grade.score is not None}
    if len(scores) < len(grades):
        return replace(whole, score=None, reason=reason)
    try:
        return replace(whole, score=combine(scores), reason=reason)
    except FormulaValueError as error:
        faults = {**faults, Fault.OTHER: str(error)}
        return replace(whole, score=None, outcome=Outcome.NOT_FINITE, reason=str(error), faults=faults)


def by_formula(formula: Formula) -> Combine:
    """What `calculate_output` says."""
    return formula.evaluate


def by_weights(weights: Mapping[str, float]) -> Combine:
    """The weighted sum."""
    return lambda scores: sum(weights[key] * score for key, score in scores.items())


def zero_failures(grader: Grader) -> Grader:
    """A grader whose failures score 0, as at OpenAI; their outcome still says that they failed."""

    def grade(samples: Sequence[Sample]) -> list[Grade]:
        return [replace(g, score=0.0) if g.score is None else g for g in grader(samples)]

    return grade


def _parts(grades: Mapping[str, Grade]) -> dict[str, float]:
    """The members' scores, and their own parts as `key.part`."""
    parts: dict[str, float] = {}
    for key, grade in grades.items():
        if grade.score is not None:
            parts[key] = grade.score
        parts |= {f"{key}.{name}": value for name, value in grade.parts.items()}
    return parts
