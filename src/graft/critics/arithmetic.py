"""Equations in prose: `3 boxes x $4/box = $12` -> what was computed and whether it is right, in exact arithmetic.

Understood: + - * / and their typographic forms, x, `times`, `of` behind a fraction or percentage, brackets, a minus in
front of a number, thousands commas, currency signs, percent and cents, mixed numbers, LaTeX's commonest spellings,
units behind numbers, chains (`3 + 4 = 7 = 14 / 2`) and run-on chains (`3 + 4 = 7 * 2 = 14`). Expressions with variables
or words among their operands are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from graft.critics.symbols import BREAK, VARIABLE, Kind, Number, Symbol, symbols_in


@dataclass(frozen=True, slots=True)
class Side:
    """One side of an equation."""

    text: str
    numbers: tuple[Number, ...]
    value: Fraction
    """With percents and cents as hundredths."""

    plain: Fraction
    """With percents and cents as if the sign were not there."""

    terms: tuple[Fraction, ...] | None = None
    """What a sum of plain numbers adds up, with signs: 3 and -7 of `3 - 7`. None: not such a sum."""

    @property
    def computes(self) -> bool:
        """Whether it is more than a number."""
        return len(self.numbers) > 1


@dataclass(frozen=True, slots=True)
class Equation:
    """`left = right`; at least one of them computes something."""

    left: Side
    right: Side
    rounded: bool = False
    """Written with ≈."""

    def __str__(self) -> str:
        return f"{self.left.text} {'≈' if self.rounded else '='} {self.right.text}"

    @property
    def computed(self) -> Side:
        """The side that computes, the left one if both do."""
        return self.left if self.left.computes else self.right

    @property
    def claimed(self) -> Side:
        """The other side."""
        return self.right if self.left.computes else self.left

    @property
    def holds(self) -> bool:
        """Whether it is right: exactly, or, where the exact result has more decimals than are written, to these."""
        computed, claimed = self.computed, self.claimed
        readings = ((computed.value, claimed.value), (computed.plain, claimed.plain))
        return any(exact == said or self._is_rounding(exact, said) for exact, said in readings)

    def _is_rounding(self, exact: Fraction, said: Fraction) -> bool:
        """Rounded or cut off, by less than one in the last place written; integers only where ≈ says so."""
        if self.claimed.computes:
            return False
        [number] = self.claimed.numbers
        percent = number.hundredths and said == self.claimed.value
        unit = Fraction(1, 10 ** (number.decimals + 2 * percent))
        if number.decimals == 0 and not self.rounded:
            return False
        return (exact / unit).denominator != 1 and abs(exact - said) < unit


def equations_in(text: str) -> list[Equation]:
    """All equations of a text, in order."""
    symbols = symbols_in(text)
    places = [place for place, symbol in enumerate(symbols) if symbol.kind is Kind.EQUALS]
    found: list[Equation] = []
    for order, place in enumerate(places):
        left, right = _ending_at(symbols, place), _beginning_at(symbols, place + 1)
        if left is None or right is None or not (left.computes or right.computes):
            continue
        equation = Equation(left, right, rounded=symbols[place].text == "≈")
        goes_on = order + 1 < len(places) and _ending_at(symbols, places[order + 1]) == right
        if goes_on and left.computes and right.computes and not equation.holds:
            run_on = Equation(left, _side(symbols[place + 1 : place + 2]) or right)
            equation = run_on if run_on.holds else equation
        found.append(equation)
    return found


def _ending_at(symbols: Sequence[Symbol], end: int) -> Side | None:
    """The longest expression that ends before an equals sign, unless it is part of one that cannot be read."""
    start = end
    while start and symbols[start - 1].kind not in (Kind.BREAK, Kind.EQUALS):
        start -= 1
    for begin in range(start, end):
        side = _side(symbols[begin:end])
        if side is None:
            continue
        before = symbols[begin - 1] if begin else None
        if begin > start and before is not None and before.kind in (Kind.OPERATOR, Kind.NUMBER):
            return side if begin == start + 1 and _is_bullet(symbols, start) else None
        stands_alone = before is not BREAK and not symbols[begin].unit
        return side if side.computes or stands_alone else None  # `Area of 4 rooms = 4 * 20` says nothing of 4
    return None


def _beginning_at(symbols: Sequence[Symbol], start: int) -> Side | None:
    """The longest expression that begins behind an equals sign, unless it goes on with what cannot be read."""
    end = start
    while end < len(symbols) and symbols[end].kind not in (Kind.BREAK, Kind.EQUALS):
        end += 1
    for stop in range(end, start, -1):
        side = _side(symbols[start:stop])
        if side is None:
            continue
        after = symbols[stop] if stop < len(symbols) else BREAK
        return None if after is VARIABLE or after.kind is Kind.OPERATOR else side
    return None


def _is_bullet(symbols: Sequence[Symbol], place: int) -> bool:
    """Whether an operator only marks the entry of a list."""
    before = symbols[place - 1] if place else None
    return symbols[place].spaced and (before is None or before.text in ("\n", ":"))


def _side(symbols: Sequence[Symbol]) -> Side | None:
    """An expression, if all of the symbols together are one."""
    numbers = tuple(symbol.number for symbol in symbols if symbol.number is not None)
    readings = []
    for hundredth in (Fraction(1, 100), Fraction(1)):
        try:
            value, end = _sum(symbols, 0, hundredth)
        except (_NoExpressionError, ZeroDivisionError):
            return None
        if end < len(symbols):
            return None
        readings.append(value)
    return Side(_spell(symbols), numbers, *readings, terms=_terms(symbols))


def sums_in(text: str) -> list[Side]:
    """The sums of plain numbers in a text that are no part of something longer."""
    symbols = symbols_in(text)
    found, start = [], 0
    while start < len(symbols):
        end = start
        while end < len(symbols) and symbols[end].kind not in (Kind.BREAK, Kind.EQUALS, Kind.WORD):
            end += 1
        side = _side(symbols[start:end])
        if side is not None and side.computes and side.terms is not None:
            found.append(side)
        start = end + 1
    return found


def _terms(symbols: Sequence[Symbol]) -> tuple[Fraction, ...] | None:
    """The signed numbers of an expression that only adds and subtracts them."""
    found: list[Fraction] = []
    sign = 1
    for symbol in symbols:
        if symbol.number is not None:
            found.append(sign * symbol.number.value)
            sign = 1
        elif symbol.kind is Kind.OPERATOR and symbol.text in "+-":
            sign *= -1 if symbol.text == "-" else 1
        else:
            return None
    return tuple(found)


class _NoExpressionError(Exception):
    """The symbols are no expression."""


def _sum(symbols: Sequence[Symbol], place: int, hundredth: Fraction) -> tuple[Fraction, int]:
    """The value of a sum that begins at `place`, and the place behind it."""
    value, place = _product(symbols, place, hundredth)
    while _operator(symbols, place) in ("+", "-"):
        sign = 1 if _operator(symbols, place) == "+" else -1
        term, place = _product(symbols, place + 1, hundredth)
        value += sign * term
    return value, place


def _product(symbols: Sequence[Symbol], place: int, hundredth: Fraction) -> tuple[Fraction, int]:
    value, place = _factor(symbols, place, hundredth)
    while True:
        operator = _operator(symbols, place)
        if operator in ("*", "/"):
            factor, place = _factor(symbols, place + 1, hundredth)
        elif place < len(symbols) and symbols[place].kind is Kind.OPEN and symbols[place].glued:  # 3(4 + 5)
            operator = "*"
            factor, place = _factor(symbols, place, hundredth)
        else:
            return value, place
        value = value / factor if operator == "/" else value * factor


def _factor(symbols: Sequence[Symbol], place: int, hundredth: Fraction) -> tuple[Fraction, int]:
    if place >= len(symbols):
        raise _NoExpressionError
    symbol = symbols[place]
    if symbol.number is not None:
        return symbol.number.value * (hundredth if symbol.number.hundredths else 1), place + 1
    if symbol.kind is Kind.OPEN:
        value, place = _sum(symbols, place + 1, hundredth)
        if place >= len(symbols) or symbols[place].kind is not Kind.CLOSE:
            raise _NoExpressionError
        return value, place + 1
    if symbol.kind is Kind.OPERATOR and symbol.text == "-" and not symbol.spaced:
        value, place = _factor(symbols, place + 1, hundredth)
        return -value, place
    raise _NoExpressionError


def _operator(symbols: Sequence[Symbol], place: int) -> str:
    return symbols[place].text if place < len(symbols) and symbols[place].kind is Kind.OPERATOR else ""


def _spell(symbols: Sequence[Symbol]) -> str:
    text = ""
    for place, symbol in enumerate(symbols):
        before = symbols[place - 1] if place else None
        is_sign = symbol.text == "-" and (before is None or before.kind in (Kind.OPERATOR, Kind.OPEN))
        tight = is_sign or symbol.kind is Kind.OPEN
        text = text.removesuffix(" ") if symbol.kind is Kind.CLOSE else text
        text += symbol.text + ("" if tight else " ")
    return text.rstrip()
