"""Prose -> symbols, by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.critics.symbols import BREAK, VARIABLE, Kind, Number, Symbol, show, symbols_in

SHOWN = {Kind.NUMBER, Kind.OPERATOR, Kind.EQUALS, Kind.OPEN, Kind.CLOSE}


def read(text: str) -> list[str]:
    """Numbers, operators, brackets and signs as they are; `|` for a break, `?` for a variable."""

    def shown(symbol: Symbol) -> str:
        if symbol.text == VARIABLE.text:
            return "?"
        return symbol.text if symbol.kind in SHOWN else "|"

    return [shown(symbol) for symbol in symbols_in(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+4=7", ["3", "+", "4", "=", "7"]),
        ("3 − 4 – 5 · 6 ÷ 2 ≈ 1", ["3", "-", "4", "-", "5", "*", "6", "/", "2", "≈", "1"]),
        ("(1,200 - .5)", ["(", "1,200", "-", ".5", ")"]),
        # units go, other words break
        ("5 apples + 3 pears", ["5", "+", "3"]),
        ("5 dollars/hour * 2", ["5", "*", "2"]),
        ("a 3-page letter", ["|", "3"]),
        ("leaving her with 35", ["|", "|", "|", "35"]),
        # spoken operators
        ("3 x 4 times 5 plus 6 minus 1", ["3", "*", "4", "*", "5", "+", "6", "-", "1"]),
        ("20% of 50", ["20%", "*", "50"]),
        ("1/4 of the 20", ["1", "/", "4", "*", "20"]),
        ("half of 20", ["|", "|", "20"]),
        ("5 - his 3", ["5", "-", "3"]),
        # letters that make another value
        ("7x + 3", ["7", "?", "+", "3"]),
        ("17 / 5 = 3 R 2", ["17", "/", "5", "=", "3", "?", "2"]),
        ("5m + 2", ["5", "+", "2"]),
        # LaTeX and Markdown
        (r"\frac{1}{2} \times 10", ["(", "(", "1", ")", "/", "(", "2", ")", ")", "*", "10"]),
        (r"**3** \text{+} `4`", ["3", "+", "4"]),
        (r"\( \$3 \cdot 4 \)", ["$3", "*", "4"]),
        # what ends an expression
        ("3 == 4 -> 5 <= 6", ["3", "|", "4", "|", "5", "|", "6"]),
        ("3, 4\n5.", ["3", "|", "4", "|", "5", "|"]),
    ],
)
def test_symbols_by_hand(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", Number(Fraction(12))),
        ("$1,234.50", Number(Fraction(2469, 2), decimals=2)),
        (".5", Number(Fraction(1, 2), decimals=1)),
        ("25%", Number(Fraction(25), hundredths=True)),
        ("40¢", Number(Fraction(40), hundredths=True)),
        ("1 1/2", Number(Fraction(3, 2))),
        ("2 and 3/4", Number(Fraction(11, 4))),
        ("40 cents.", Number(Fraction(40), hundredths=True)),
    ],
)
def test_numbers_by_hand(text, number):
    assert symbols_in(text)[0].number == number


def test_units_and_neighbours_are_marked():
    apples, plus, three, _ = symbols_in("5 apples +3!")
    assert (apples.unit, apples.spaced, three.unit) == (True, True, False)
    assert (plus.glued, plus.spaced, three.glued) == (False, False, True)
    assert symbols_in("cats")[0].text == BREAK.text


@pytest.mark.parametrize(
    ("value", "text"),
    [("7", "7"), ("-3", "-3"), ("1/2", "0.5"), ("1/3", "0.3333"), ("20/3", "6.667"), ("1234567", "1234567")],
)
def test_numbers_for_people(value, text):
    assert show(Fraction(value)) == text


def test_a_number_shows_its_percent_sign():
    assert str(Number(Fraction(5, 2), decimals=1, hundredths=True)) == "2.5%"


@given(st.integers(0, 10**9), st.integers(0, 4), st.booleans())
def test_a_number_is_read_back(value, decimals, thousands):
    text = f"{value / 10**decimals:{',' if thousands else ''}.{decimals}f}"
    [symbol] = symbols_in(text)
    assert symbol.number == Number(Fraction(text.replace(",", "")), decimals=decimals)


@given(st.text(st.sampled_from("0123456789+-*/=x().,%$¢ aé\n≈\\{}"), max_size=60))
def test_no_text_harms(text):
    for symbol in symbols_in(text):
        assert symbol.kind is not Kind.WORD  # units are gone, other words are breaks
        assert (symbol.number is not None) == (symbol.kind is Kind.NUMBER)
