"""Between which numbers a grader's scores lie."""

from __future__ import annotations

from itertools import product

from graft.grading.formula import FormulaValueError, parse_formula
from graft.grading.schema import GraderSpec, Multi, ScoreModel, Weighted

MOST_VARIABLES = 12
"""Of a formula that is tried at every combination of its members' ends."""


def score_range(spec: GraderSpec) -> tuple[float, float] | None:
    """Smallest and largest score that a grader can be seen to give; None where that cannot be told.

    Members whose scores nobody declares (`python`, `function`, `endpoint`) are taken to give 0 to 1. A formula is tried
    where its members give their smallest or largest score, so that it may go further in between.
    """
    if isinstance(spec, ScoreModel):
        return spec.range[0], spec.range[1]
    if isinstance(spec, Weighted):
        ends = [
            sorted(weight * end for end in _ends(spec.graders[key])) for key, weight in spec.weights.items()
        ]
        return sum(low for low, _ in ends), sum(high for _, high in ends)
    return _of_formula(spec) if isinstance(spec, Multi) else (0.0, 1.0)


def _of_formula(spec: Multi) -> tuple[float, float] | None:
    formula = parse_formula(spec.calculate_output, list(spec.graders))
    names = sorted(formula.names)
    if len(names) > MOST_VARIABLES:
        return None
    values: list[float] = []
    for ends in product(*(_ends(spec.graders[name]) for name in names)):
        try:
            values.append(formula.evaluate(dict(zip(names, ends, strict=True))))
        except FormulaValueError:
            continue
    return (min(values), max(values)) if values else None


def _ends(spec: GraderSpec) -> tuple[float, float]:
    return score_range(spec) or (0.0, 1.0)
