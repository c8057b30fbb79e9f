"""Several graders, one score, and what their failures do."""

from __future__ import annotations

from typing import Any

import pytest

from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.formula import parse_formula
from graft.grading.multi import MultiGrader, by_formula, combined
from graft.grading.observe import Observer
from graft.types import Fault, Grade, Outcome, TokenUsage
from tests.grading.samples import sample

EXACT = {
    "type": "string_check",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
NEAR = {**EXACT, "type": "text_similarity", "evaluation_metric": "fuzzy_match"}
del NEAR["operation"]
MULTI = {
    "type": "multi",
    "graders": {"exact": EXACT, "near": NEAR},
    "calculate_output": "0.25*exact + 0.75*near",
}


def grade(spec: dict[str, Any], text: str, *, zero: bool = False, **item: Any) -> Grade:
    [one] = build_grader(parse_grader(spec), Services(), Observer(), zero=zero)([sample(text, **item)])
    return one


def test_a_formula_over_parts():
    assert grade(MULTI, "paris", answer="Paris") == Grade(0.75, parts={"exact": 0.0, "near": 1.0})
    assert grade(MULTI, "Paris", answer="Paris").score == 1.0


def test_a_weighted_sum():
    spec = {
        "type": "weighted",
        "graders": {"exact": EXACT, "near": NEAR},
        "weights": {"exact": 2, "near": -0.5},
    }
    assert grade(spec, "Paris", answer="Paris") == Grade(1.5, parts={"exact": 1.0, "near": 1.0})


def test_samples_keep_their_order():
    grader = build_grader(parse_grader(MULTI), Services(), Observer())
    grades = grader([sample(text, answer="a") for text in ("a", "zz", "a")])
    assert [g.parts["exact"] for g in grades] == [1.0, 0.0, 1.0]


def test_members_of_our_own():
    spec = {
        "type": "multi",
        "graders": {"number": {"type": "number"}, "form": {"type": "regex", "pattern": "^Answer:"}},
        "calculate_output": "number * (0.5 + 0.5*form)",
    }
    assert [grade(spec, text, answer=4).score for text in ("Answer: 4", "it is 4", "Answer: 5")] == [
        1.0,
        0.5,
        0.0,
    ]


MISSING = {**MULTI, "graders": {"exact": EXACT, "near": {**NEAR, "reference": "{{item.other}}"}}}


def test_a_failure_of_ours_leaves_the_whole_without_a_score():
    graded = grade(MISSING, "Paris", answer="Paris")
    assert (graded.score, graded.outcome) == (None, Outcome.CRASHED)
    assert graded.parts == {"exact": 1.0}
    assert list(graded.faults) == [Fault.INVALID_VARIABLE]
    assert graded.reason.startswith("near: ")


def test_where_zeros_are_wanted_the_formula_runs_with_them_and_the_failure_is_told():
    graded = grade(MISSING, "Paris", zero=True, answer="Paris")
    assert (graded.score, graded.outcome, graded.failed) == (0.25, Outcome.CRASHED, True)
    assert graded.parts == {"exact": 1.0, "near": 0.0}


@pytest.mark.parametrize("formula", ["1/near", "log(near)", "exp(1000*exact)*0 + sqrt(0-exact)"])
def test_a_formula_without_a_value(formula):
    spec = {**MULTI, "calculate_output": formula, "graders": {"exact": EXACT, "near": EXACT}}
    text = "Paris" if "exact" in formula else "Rome"
    graded = grade(spec, text, answer="Paris")
    assert (graded.score, graded.outcome, list(graded.faults)) == (None, Outcome.NOT_FINITE, [Fault.OTHER])
    assert "exact = " in graded.reason
    zero = grade(spec, text, zero=True, answer="Paris")
    assert (zero.score, zero.outcome) == (0.0, Outcome.NOT_FINITE)


@pytest.mark.parametrize(
    ("outcomes", "outcome"),
    [
        ([Outcome.GRADED, Outcome.GRADED], Outcome.GRADED),
        ([Outcome.GRADED, Outcome.UNPARSEABLE], Outcome.GRADED),
        ([Outcome.UNPARSEABLE, Outcome.UNPARSEABLE], Outcome.UNPARSEABLE),
    ],
)
def test_the_models_faults_score(outcomes, outcome):
    grades = {key: Grade(0.0, own) for key, own in zip("ab", outcomes, strict=True)}
    assert combined(grades, by_formula(parse_formula("a + b"))) == Grade(
        0.0, outcome, parts={"a": 0.0, "b": 0.0}
    )


def test_usage_adds_up_and_parts_of_parts_keep_their_names():
    def member(model: str, prompt: int):
        return lambda samples: [
            Grade(1.0, parts={"form": 0.5}, usage={model: TokenUsage(prompt, 1, 0)}) for _ in samples
        ]

    members = {"a": member("m", 1), "b": member("m", 2), "c": member("n", 4)}
    [graded] = MultiGrader(members, by_formula(parse_formula("a+b+c")))([sample()])
    assert graded.usage == {"m": TokenUsage(3, 2, 0), "n": TokenUsage(4, 1, 0)}
    assert graded.parts == {"a": 1.0, "a.form": 0.5, "b": 1.0, "b.form": 0.5, "c": 1.0, "c.form": 0.5}
