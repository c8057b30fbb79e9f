"""Numbers in text by hand, and what a row must hold."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError
from graft.grading.number import NumberGrader, as_number, numbers_in
from graft.types import Outcome, Prompt, Sample, StopReason


def sample(text: str, row: int = 3, **item) -> Sample:
    prompt = Prompt(row=row, messages=(), item=item, tokens=np.array([1], np.int32), question="")
    return Sample(prompt=prompt, text=text, tokens=5, stop=StopReason.EOS)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("no number", []),
        ("...", []),
        ("7", ["7"]),
        ("The answer is 12.", ["12"]),  # the period ends the sentence
        ("3.14.", ["3.14"]),
        ("3.140", ["3.140"]),
        (".5 and 0.5", ["0.5", "0.5"]),
        ("5.", ["5"]),
        # signs: of a number, unless they subtract from what stands before
        ("-5", ["-5"]),
        ("+5", ["5"]),
        ("−5", ["-5"]),  # U+2212
        ("= -5", ["-5"]),
        ("=-5", ["-5"]),
        ("7-5", ["7", "5"]),
        ("7−5", ["7", "5"]),
        ("7+5", ["7", "5"]),
        ("(7)-5", ["7", "5"]),
        ("[7]-5", ["7", "5"]),
        ("(-5)", ["-5"]),
        ("7 - 5", ["7", "5"]),
        ("7 -5", ["7", "-5"]),
        ("-.5", ["-0.5"]),
        ("-1,000.5", ["-1000.5"]),
        # a comma groups thousands
        ("1,234", ["1234"]),
        ("1,234,567.89", ["1234567.89"]),
        ("12,345 and 6", ["12345", "6"]),
        ("1, 2, 3", ["1", "2", "3"]),
        ("12345", ["12345"]),
        # any other separates
        ("(3,4)", ["3", "4"]),
        ("first,5", ["5"]),
        ("1,2,3", ["1", "2", "3"]),
        ("3,-4", ["3", "-4"]),
        ("12,34", ["12", "34"]),
        ("x=1,234,y=5", ["1234", "5"]),
        ("1.5,2.5", ["1.5", "2.5"]),
        # units
        ("50%", ["50"]),
        ("$3.50", ["3.50"]),
        ("-$3", ["3"]),
        ("4kg", ["4"]),
        ("x=3,y=4", ["3", "4"]),
        ("3/4", ["3", "4"]),
        ("2*3=6", ["2", "3", "6"]),
        ("3x4", ["3", "4"]),
        ("**42**", ["42"]),
        ("\\boxed{42}", ["42"]),
        ("007", ["7"]),
    ],
)
def test_numbers_by_hand(text, numbers):
    assert numbers_in(text) == [Decimal(n) for n in numbers]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_that_is_written_down_is_read(number):
    for text in (f"{number}", f"{number:,}", f"so x = {number}.", f"{number} is it"):
        assert numbers_in(text) == [number]


@given(st.text())
def test_any_text_can_be_read(text):
    assert all(number.is_finite() for number in numbers_in(text))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("12", "12"),
        (" 12 ", "12"),
        ("−12", "-12"),  # U+2212
        ("3,4", None),
        ("12,34", None),
        ("1,234,567", "1234567"),
        ("-1,234.5", "-1234.5"),
        (12, "12"),
        (0.5, "0.5"),
        (True, None),
        (None, None),
        ("twelve", None),
        ("12 apples", None),
        ("nan", None),
        ("inf", None),
        (float("nan"), None),
        (["12"], None),
    ],
)
def test_a_rows_value(value, number):
    assert as_number(value) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("2 + 2 = 4", "4", 1.0),
        ("4, no, 5", "4", 0.0),  # the last number counts
        ("it is 4.0", 4, 1.0),
        ("it is 1,200.", "1200", 1.0),
        ("so 0.1", 0.1, 1.0),  # as written, not as a binary fraction
        ("so 3 - 5 = -2", "-2", 1.0),
        ("so 3 - 5 = 2", "-2", 0.0),
    ],
)
def test_the_last_number_decides(text, answer, score):
    [grade] = NumberGrader("answer")([sample(text, answer=answer)])
    assert grade.score == score
    assert grade.outcome is Outcome.GRADED


def test_no_number_is_the_models_fault():
    [grade] = NumberGrader("answer")([sample("I do not know", answer="4")])
    assert grade.score == 0.0
    assert grade.outcome is Outcome.UNPARSEABLE
    assert "no number" in grade.reason


def test_grades_come_in_the_order_of_the_samples():
    texts = ["4", "5", "none", "4"]
    grades = NumberGrader("total")([sample(text, total=4) for text in texts])
    assert [grade.score for grade in grades] == [1.0, 0.0, 0.0, 1.0]
    assert NumberGrader("total")([]) == []


def test_a_missing_key_is_named_with_those_there_are():
    with pytest.raises(DataError, match=r"row 3: item\.answer .* no such key.*solution, total.*grader\.key"):
        NumberGrader("answer")([sample("4", total=4, solution="4")])


def test_a_value_that_is_no_number_is_shown():
    with pytest.raises(DataError, match=r"row 9: item\.answer must hold a number, got 'four'"):
        NumberGrader("answer")([sample("4", row=9, answer="four")])
