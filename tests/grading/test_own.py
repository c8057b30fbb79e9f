"""graft's own graders: regex, json_schema, math."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError, GraderError
from graft.grading import own
from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.math_worker import MathWorker
from graft.grading.observe import Observer
from graft.grading.schema import Math
from graft.types import Grade, Outcome
from tests.grading.samples import sample


def grade(spec: dict[str, Any], text: str, **item: Any) -> Grade:
    [one] = build_grader(parse_grader(spec), Services(), Observer())([sample(text, **item)])
    return one


@pytest.mark.parametrize(
    ("pattern", "whole", "text", "score"),
    [
        (r"^Answer: \d+$", False, "Answer: 4", 1.0),
        (r"^Answer: \d+$", False, "So\nAnswer: 4", 0.0),
        (r"(?m)^Answer: \d+$", False, "So\nAnswer: 4", 1.0),
        (r"\d", False, "x4", 1.0),
        (r"\d", True, "x4", 0.0),
        (r"\d", True, "4", 1.0),
        (r"", False, "", 1.0),
    ],
)
def test_regex(pattern, whole, text, score):
    assert grade({"type": "regex", "pattern": pattern, "whole": whole}, text).score == score


def test_a_pattern_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(own, "REGEX_TIMEOUT_S", 0.01)
    graded = grade({"type": "regex", "pattern": r"^(a|aa)+$"}, "a" * 60 + "b")
    assert (graded.score, graded.outcome) == (None, Outcome.TIMED_OUT)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("text", "score", "outcome"),
    [
        ('{"n": 3}', 1.0, Outcome.GRADED),
        ('{"n": -3}', 0.0, Outcome.GRADED),
        ('{"m": 3}', 0.0, Outcome.GRADED),
        ("[]", 0.0, Outcome.GRADED),
        ("n = 3", 0.0, Outcome.UNPARSEABLE),
        ("", 0.0, Outcome.UNPARSEABLE),
        ('{"n": NaN}', 0.0, Outcome.UNPARSEABLE),
    ],
)
def test_json_schema(text, score, outcome):
    graded = grade({"type": "json_schema", "schema": SCHEMA}, text)
    assert (graded.score, graded.outcome) == (score, outcome)
    assert bool(graded.reason) == (score == 0)


def test_a_schema_that_is_none_is_refused_when_built():
    with pytest.raises(GraderError, match=r"schema is no JSON schema: \$\.type: 'objekt'"):
        grade({"type": "json_schema", "schema": {"type": "objekt"}}, "{}")


def test_a_schema_fetches_nothing():
    with pytest.raises(GraderError, match=r"the schema cannot be applied: .*127\.0\.0\.1:9"):
        grade({"type": "json_schema", "schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "{}")


@given(st.text(max_size=30))
def test_any_text_has_a_form_or_not(text):
    assert grade({"type": "json_schema", "schema": SCHEMA}, text).score in (0.0, 1.0)


# -- math -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker() -> Iterator[MathWorker]:
    one = MathWorker()
    yield one
    one.close()


@pytest.mark.parametrize(
    ("text", "reference", "verdict"),
    [
        ("The answer is 4.", "4", "equal"),
        ("The answer is 5.", "4", "different"),
        ("so $x = \\frac{1}{2}$", "0.5", "equal"),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", "equal"),
        ("$\\sqrt{8}$", "$2\\sqrt{2}$", "equal"),
        ("$(x+1)^2$", "$x^2 + 2x + 1$", "equal"),
        ("$\\{1, 2\\}$", "$\\{2, 1\\}$", "equal"),
        ("1,234", "1234", "equal"),
        ("50%", "50\\%", "equal"),
        ("first 4, then 7", "7", "equal"),  # the last one counts
        ("She answered 12 of them.\nSo 5 are left.", "5", "equal"),
        ("The answer is 4.\n\nHope that helps!", "4", "equal"),
        ("It is $$\n\\frac{1}{2}\n$$", "0.5", "equal"),
        ("\\boxed{4}\nLine 2 said 7.", "4", "equal"),
        ("I do not know", "4", "no answer"),
        ("", "4", "no answer"),
        ("4", "no number here", "no reference"),
    ],
)
def test_meanings(worker, text, reference, verdict):
    assert worker.compare(text, reference) == verdict


def test_grades_of_meanings(worker):
    judge = own.math(Math(type="math"), worker)
    observe = Observer()

    def graded(text: str, answer: Any) -> Grade:
        return judge(observe(sample(text, answer=answer)))

    assert graded("it is 4", 4).score == 1.0
    assert graded("it is 5", "4").score == 0.0
    assert graded("no idea", "4").outcome is Outcome.UNPARSEABLE
    with pytest.raises(DataError, match=r"reference 'words' .* holds no mathematical expression"):
        graded("4", "words")


def test_a_process_that_died_is_started_anew(worker):
    assert worker.compare("4", "4") == "equal"
    worker._process.kill()
    worker._process.wait()
    assert worker.compare("4", "4") == "timed out"
    assert worker.compare("4", "4") == "equal"


def test_what_takes_too_long_is_no_score():
    """A tower of powers that sympy would compute for ever; the process's own limit stops it, or ours does."""
    worker = MathWorker(timeout_s=1.0)
    judge = own.math(Math(type="math"), worker)
    graded = judge(Observer()(sample("$9^{9^{9^{9}}}$", answer="$9^{9^{9^{8}}}$")))
    assert worker.compare("4", "4") == "equal"
    worker.close()
    assert graded.score in (None, 0.0)


@pytest.mark.parametrize("text", ["\ud800", "a\nb\r\u2028c", "\0", "$" * 500, "\\frac{" * 200, "{" * 3000])
def test_hostile_texts_do_no_harm(worker, text):
    assert worker.compare(text, "4") in ("equal", "different", "no answer", "timed out")
    assert worker.compare("4", "4") == "equal"
