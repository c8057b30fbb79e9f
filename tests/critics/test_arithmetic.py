"""Equations in prose, read and checked by hand."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.critics.arithmetic import equations_in


def read(text: str) -> list[str]:
    """`equation` or `equation!` where it is wrong."""
    return [f"{equation}{'' if equation.holds else '!'}" for equation in equations_in(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("leaving her with $50 - 15 = 35$ dollars", ["$50 - 15 = 35"]),  # LaTeX's delimiters, as in the deck
        ("3+4=7", ["3 + 4 = 7"]),
        ("3 + 4 = 8", ["3 + 4 = 8!"]),
        ("48/2 = 24 clips, and 48+24 = 72 clips", ["48 / 2 = 24", "48 + 24 = 72"]),
        ("12 x 3 = 36, 12×3=36, 12 * 3 = 36, 12 times 3 = 36", ["12 * 3 = 36"] * 4),
        ("8 ÷ 2 = 4; 8 / 2 = 4; 9 − 2 = 7; 9 – 2 = 7", ["8 / 2 = 4", "8 / 2 = 4", "9 - 2 = 7", "9 - 2 = 7"]),
        ("1,200 + 1 = 1,201", ["1,200 + 1 = 1,201"]),
        ("3, 4 + 5 = 9", ["4 + 5 = 9"]),
        ("2 * (3 + 4) = 14", ["2 * (3 + 4) = 14"]),
        ("3(4 + 5) = 27", ["3 (4 + 5) = 27"]),
        ("2 + 3 * 4 = 14, 2 + 3 * 4 = 20", ["2 + 3 * 4 = 14", "2 + 3 * 4 = 20!"]),
        ("10 - 3 - 2 = 5 and 16 / 4 / 2 = 2", ["10 - 3 - 2 = 5", "16 / 4 / 2 = 2"]),
        ("-5 + 3 = -2", ["-5 + 3 = -2"]),
        ("7 - 10 = -3", ["7 - 10 = -3"]),
        ("1 1/2 * 2 = 3 and 3 * 1/2 = 1 1/2", ["1 1/2 * 2 = 3", "3 * 1 / 2 = 1 1/2"]),
        ("8 / 0 = 1", []),
        # units
        ("5 hours * $3/hour = $15", ["5 * $3 = $15"]),
        ("6350 kg / 50 kg/bag = 127 bags", ["6350 / 50 = 127"]),
        ("3 eggs for her husband + 2 for herself = 5 eggs", ["3 + 2 = 5"]),
        ("a 3-page letter to 2 friends, so 3*2=6 pages", ["3 * 2 = 6"]),
        ("She had 5 apples and 2 pears so 5 + 2 = 7", ["5 + 2 = 7"]),
        ("makes 2*13.50 = $27.00 a day", ["2 * 13.50 = $27.00"]),
        # percent and cents
        (
            "20% of 50 = 10; 50 * 20% = 10; 20/100 * 50 = 10",
            ["20% * 50 = 10", "50 * 20% = 10", "20 / 100 * 50 = 10"],
        ),
        ("1/4 of the 20 apples = 5", ["1 / 4 * 20 = 5"]),
        ("100% - 20% = 80% and 5/20 = 25%", ["100% - 20% = 80%", "5 / 20 = 25%"]),
        ("5 / 20 * 100 = 25%", ["5 / 20 * 100 = 25%"]),
        ("4 * 25 cents = $1 = 100 cents", ["4 * 25 = $1"]),
        # rounding
        ("10 / 3 = 3.33, 2/3 = 0.67, 2/3 = 0.66", ["10 / 3 = 3.33", "2 / 3 = 0.67", "2 / 3 = 0.66"]),
        ("10 / 3 = 3.34, 10 / 3 = 3, 10 / 3 ≈ 3", ["10 / 3 = 3.34", "10 / 3 = 3!", "10 / 3 ≈ 3"]),
        ("10 / 3 = 3.32, 25 / 2 = 12.4", ["10 / 3 = 3.32!", "25 / 2 = 12.4!"]),
        # chains
        ("3 + 4 = 5 + 2 = 7", ["3 + 4 = 5 + 2", "5 + 2 = 7"]),
        ("3 + 4 = 7 * 2 = 14", ["3 + 4 = 7", "7 * 2 = 14"]),
        ("3 + 4 = 8 * 2 = 16", ["3 + 4 = 8 * 2!", "8 * 2 = 16"]),
        ("x = 10 / 2 = 5", ["10 / 2 = 5"]),
        ("7 = 3 + 4", ["7 = 3 + 4"]),
        # left alone
        ("x + 3 + 4 = 9; 2x + 3x = 10; 5x = 20; 17 / 5 = 3 R 2", []),
        ("Total cost + 5 + 6 = 20", []),
        ("4 + 5 = 12 - tax * 2", []),
        ("4 + 5 = 7 + y", []),
        ("Area of 4 rooms = 4 * 20 = 80", ["4 * 20 = 80"]),
        ("so 5 => 3 + 4, 3 + 4 == 7, 3 <= 4 + 5", []),
        ("the answer is 5", []),
        ("x = 5", []),
        # marks of lists
        ("- 3 + 4 = 7", ["3 + 4 = 7"]),
        ("1. 3 + 4 = 7", ["3 + 4 = 7"]),
        ("2) 3 + 4 = 7", ["3 + 4 = 7"]),
        ("**3 + 4 = 7**", ["3 + 4 = 7"]),
        (r"\frac{1}{2} \times 10 = 5", ["((1) / (2)) * 10 = 5"]),
        (r"\( \$3 \cdot 4 = \$12 \)", ["$3 * 4 = $12"]),
    ],
)
def test_equations(text, expected):
    assert read(text) == expected


SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
numbers = st.integers(0, 9999)


@given(numbers, st.sampled_from("+-*/"), numbers, st.integers(-3, 3), st.booleans())
def test_against_fractions(a, sign, b, off, thousands):
    if sign == "/" and b == 0:
        return
    exact = SIGNS[sign](Fraction(a), Fraction(b))
    if exact.denominator != 1:
        return
    shown = (lambda n: f"{n:,}") if thousands else str
    text = f"so we get {shown(a)} apples {sign} {shown(b)} = {shown(int(exact) + off)} in all."
    [equation] = equations_in(text)
    assert equation.holds == (off == 0)
    assert equation.computed.value == exact
    assert [number.value for number in equation.computed.numbers] == [a, b]


@given(
    st.recursive(
        st.integers(1, 20).map(str),
        lambda e: st.tuples(e, st.sampled_from("+-*"), e).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        max_leaves=6,
    )
)
def test_brackets_against_python(expression):
    value = eval(expression)
    if not expression.startswith("("):
        return
    [equation] = equations_in(f"{expression} = {value}")
    assert equation.holds
    [wrong] = equations_in(f"{expression} = {value + 1}")
    assert not wrong.holds


@given(st.text(st.sampled_from("0123456789+-*/=x().,%$ aé\n≈\\{}"), max_size=60))
def test_no_text_harms(text):
    for equation in equations_in(text):
        assert isinstance(equation.holds, bool)
        assert str(equation)
