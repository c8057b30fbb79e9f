"""The numbers that a question gives, in digits and in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from graft.critics.symbols import Kind, Number, symbols_in

_TO_NINETEEN = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_CARDINALS = {
    **{word: value for value, word in enumerate(_TO_NINETEEN.split())},
    **{word: 10 * value for value, word in enumerate(_TENS.split(), start=2)},
}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_IMPLIED: dict[str, tuple[Fraction, ...]] = {
    word: tuple(map(Fraction, values.split()))
    for words, values in (
        ("one once single", "1"),
        ("half halves halved", "2 1/2 50"),
        ("twice double doubles doubled doubling couple pair pairs both twin twins", "2"),
        ("thrice triple triples tripled", "3"),
        ("third thirds", "3 1/3"),
        ("quarter quarters fourth fourths quadruple", "4 1/4 25"),
        ("fifth fifths", "5 1/5 20"),
        ("sixth sixths", "6 1/6"),
        ("seventh eighth ninth tenth eighths tenths", "7 8 9 10 1/8 1/10"),
        ("dozen dozens", "12"),
        ("hundred hundreds percent percentage cent cents penny pennies dollar dollars", "100"),
        ("thousand thousands kilometer kilometers kilogram kilograms kg km liter liters", "1000"),
        ("million millions", "1000000"),
        ("billion billions", "1000000000"),
        ("second seconds minute minutes hour hours hourly am pm", "60 12 24 3600"),
        ("day days daily today", "24 7 365 30"),
        ("week weeks weekly weekday weekdays weekend weekends", "7 5 2 52 4"),
        ("month months monthly", "12 30 4 31"),
        ("year years yearly annual annually", "12 52 365"),
        ("decade decades", "10"),
        ("foot feet inch inches", "12"),
        ("yard yards", "3 36"),
        ("pound pounds ounce ounces", "16"),
        ("nickel nickels", "5 1/20"),
        ("dime dimes", "10 1/10"),
        ("square rectangle rectangular perimeter average", "2 4"),
    )
    for word in words.split()
}
"""What a word lets one compute with, though it is no number that has to be used."""

_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Given:
    """What a question gives to compute with."""

    numbers: Counter[Fraction]
    """Each number that stands in it, as often as it does."""

    implied: frozenset[Fraction]
    """Further values that its words allow: 2 for `twice`, 7 for `week`, 1/4 for `25%`."""


def numbers_given(question: str) -> Given:
    """Read a question.

    Numbers are those in digits and the cardinals from two to ninety-nine in words; `one` is left out, as it mostly
    counts nothing.
    """
    numbers: Counter[Fraction] = Counter()
    implied: set[Fraction] = {Fraction(1)}
    for symbol in symbols_in(question):
        if symbol.kind is Kind.NUMBER and symbol.number is not None:
            value = symbol.number.value
            numbers[value] += 1
            if symbol.number.hundredths:
                implied |= {
                    Fraction(100),
                    value / 100,
                    100 - value,
                    1 - value / 100,
                    100 + value,
                    1 + value / 100,
                }
    words = _WORD.findall(question.lower())
    for value in _cardinals(words):
        numbers[Fraction(value)] += 1
    for word in words:
        implied.update(_IMPLIED.get(word, ()))
        implied.update(value * _MULTIPLES[word] for value in list(numbers) if word in _MULTIPLES)
    return Given(numbers, frozenset(implied))


def readings(number: Number) -> tuple[Fraction, ...]:
    """The values that a number may stand for: itself, and with a percent sign its hundredth."""
    return (number.value, number.value / 100) if number.hundredths else (number.value,)


def _cardinals(words: Iterable[str]) -> list[int]:
    """`twenty`, `five` next to each other are one number."""
    found: list[int] = []
    tens_open = False
    for word in words:
        value = _CARDINALS.get(word)
        if value is None:
            tens_open = False
        elif tens_open and 0 < value < 10:
            found[-1] += value
            tens_open = False
        elif value > 1:
            found.append(value)
            tens_open = value >= 20
    return found
