"""The numbers of a question, by hand and by construction."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.critics.question import numbers_given, readings
from graft.critics.symbols import Number


@pytest.mark.parametrize(
    ("question", "numbers"),
    [
        ("How many?", {}),
        ("Sarah had $50 and spent $15.", {50: 1, 15: 1}),
        ("5 boys with 5 apples", {5: 2}),
        ("1,200 men, 2.5 kg and 3/4", {1200: 1, Fraction(5, 2): 1, 3: 1, 4: 1}),
        ("1 1/2 cups", {Fraction(3, 2): 1}),
        ("twenty-five men, twenty five women and Ninety girls", {25: 2, 90: 1}),
        ("twenty, thirty", {20: 1, 30: 1}),
        ("five twenty", {5: 1, 20: 1}),  # no number below twenty goes before the tens
        ("twenty fifteen", {20: 1, 15: 1}),
        ("one man and zero women", {}),  # `one` mostly counts nothing
        ("tennis, someone, twofold", {}),
    ],
)
def test_numbers_by_hand(question, numbers):
    assert numbers_given(question).numbers == Counter(
        {Fraction(key): count for key, count in numbers.items()}
    )


@pytest.mark.parametrize(
    ("question", "implied"),
    [
        ("nothing", ["1"]),
        ("half of them", ["2", "1/2", "50"]),
        ("three dozen", ["12"]),
        ("25% more", ["100", "1/4", "75", "3/4", "125", "5/4"]),
        ("40 cents", ["100", "2/5", "60", "3/5", "140", "7/5"]),
        ("each weekday", []),
        ("every week", ["7", "5", "2", "52", "4"]),
        ("It made $120 million", ["1000000", "120000000"]),
        ("two hundred", ["100", "200"]),
    ],
)
def test_implied_values_by_hand(question, implied):
    found = numbers_given(question).implied
    assert {Fraction(value) for value in implied} <= found
    assert Fraction(1) in found
    assert Fraction(13) not in found


@given(st.lists(st.integers(2, 99), max_size=6))
def test_words_and_digits_give_the_same(values):
    """Every number spelled out, separated so that none joins its neighbour."""
    units = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    below_twenty = (units + "seventeen eighteen nineteen").split()
    tens = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

    def spelled(value: int) -> str:
        if value < 20:
            return below_twenty[value]
        return tens[value // 10 - 2] + (f"-{below_twenty[value % 10]}" if value % 10 else "")

    words = numbers_given(" men and ".join(map(spelled, values))).numbers
    digits = numbers_given(" men and ".join(map(str, values))).numbers
    assert words == digits == Counter(map(Fraction, values))


@given(st.text(max_size=60))
def test_no_question_harms(question):
    given_by_it = numbers_given(question)
    assert all(count > 0 for count in given_by_it.numbers.values())


def test_readings():
    assert readings(Number(Fraction(25))) == (25,)
    assert readings(Number(Fraction(25), hundredths=True)) == (25, Fraction(1, 4))
