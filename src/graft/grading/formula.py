"""The formulas of `calculate_output`: own grammar, own parser; nothing is evaluated as Python.

    expression := term (("+" | "-") term)*
    term       := unary (("*" | "/") unary)*
    unary      := "-" unary | power
    power      := atom ("^" unary)?                      # right-associative; -2^2 is -4
    atom       := number | name | function "(" expression ("," expression)* ")" | "(" expression ")"

Functions: `min` and `max` of one or more numbers; `abs`, `floor`, `ceil`, `exp`, `sqrt`, `log` (natural) of one.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LONGEST = 10_000
"""Characters of a formula."""

DEEPEST = 50
"""Levels of nesting of a formula."""

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": lambda *numbers: min(numbers),
    "max": lambda *numbers: max(numbers),
    "abs": abs,
    "floor": lambda x: float(math.floor(x)),
    "ceil": lambda x: float(math.ceil(x)),
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_ANY_COUNT = ("min", "max")
_OPERATORS: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "^": math.pow,
}
NAME = re.compile(r"[^\W\d]\w*")
"""What a variable looks like."""

_TOKEN = re.compile(
    rf"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    rf"|(?P<name>{NAME.pattern})|(?P<sign>[-+*/^(),]))"
)


class FormulaError(ValueError):
    """A text is no formula. The message says where, what it got and what it wants."""


class FormulaValueError(ArithmeticError):
    """A formula has no finite value for these scores."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: Literal["number", "name", "sign", "end"]
    text: str
    column: int


@dataclass(frozen=True, slots=True)
class _Apply:
    """Replace the last `count` values by a function of them."""

    function: Callable[..., Any]
    count: int


_Instruction = float | str | _Apply
"""A number, a variable, or a function; operands come before their function, so that evaluating needs no recursion."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A parsed formula."""

    text: str
    _program: tuple[_Instruction, ...]

    @property
    def names(self) -> frozenset[str]:
        """The variables that it uses."""
        return frozenset(entry for entry in self._program if isinstance(entry, str))

    def evaluate(self, values: Mapping[str, float]) -> float:
        """Its value.

        Args:
            values: variable -> number; at least the formula's `names`.

        Raises:
            FormulaValueError: division by zero, overflow, a root or logarithm that does not exist; also in a part that
                `min` or `max` would leave out.
        """
        try:
            value = float(self._run(values))
        except (ArithmeticError, ValueError) as error:
            raise FormulaValueError(f"{self.text!r} has no value for {_shown(values)}: {error}") from None
        if not math.isfinite(value):
            raise FormulaValueError(f"{self.text!r} is {value} for {_shown(values)}")
        return value

    def _run(self, values: Mapping[str, float]) -> float:
        stack: list[float] = []
        for entry in self._program:
            if isinstance(entry, _Apply):
                value = entry.function(*stack[-entry.count :])
                if not math.isfinite(value):  # here: `min` and `max` would swallow it
                    raise OverflowError(f"{value} on the way")
                stack[-entry.count :] = [value]
            else:
                stack.append(values[entry] if isinstance(entry, str) else entry)
        return stack[0]


def parse_formula(text: str, names: Sequence[str] | None = None) -> Formula:
    """Read a formula.

    Args:
        text: what `calculate_output` holds.
        names: the variables that there are; None: any.

    Raises:
        FormulaError: it does not follow the grammar, is too long or too deep, or uses another variable.
    """
    if len(text) > LONGEST:
        raise FormulaError(f"a formula of {len(text)} characters; want at most {LONGEST}")
    formula = Formula(text, _Parser(text).parse())
    for name in sorted(formula.names - set(names)) if names is not None else ():
        known = list(names or ())
        near = [n for n in known if n.startswith(name)] or difflib.get_close_matches(name, known, n=1)
        wanted = f"{near[0]!r}" if near else f"one of: {', '.join(known) or 'none'}"
        raise FormulaError(f"the variable {name!r}, which is no grader's key; want {wanted}")
    return formula


class _Parser:
    """Recursive descent over the tokens of one formula; each rule appends what it read to the program."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._next = 0
        self._depth = 0
        self._program: list[_Instruction] = []

    def parse(self) -> tuple[_Instruction, ...]:
        self._expression()
        if self._token.kind != "end":
            raise self._error("an operator or the end")
        return tuple(self._program)

    def _expression(self) -> None:
        self._chain(self._term, "+-")

    def _term(self) -> None:
        self._chain(self._unary, "*/")

    def _chain(self, operand: Callable[[], None], signs: str) -> None:
        operand()
        while self._token.kind == "sign" and self._token.text in signs:
            sign = self._take().text
            operand()
            self._program.append(_Apply(_OPERATORS[sign], 2))

    def _unary(self) -> None:
        """Every nesting passes here: brackets, functions, signs and powers."""
        self._depth += 1
        if self._depth > DEEPEST:
            raise FormulaError(f"more than {DEEPEST} levels of nesting; want fewer")
        if self._token.text == "-":
            self._take()
            self._unary()
            self._program.append(_Apply(operator.neg, 1))
        else:
            self._power()
        self._depth -= 1

    def _power(self) -> None:
        self._atom()
        if self._token.text == "^":
            self._take()
            self._unary()
            self._program.append(_Apply(_OPERATORS["^"], 2))

    def _atom(self) -> None:
        token = self._token
        if token.text == "(":
            self._take()
            self._expression()
            self._expect(")")
        elif token.kind == "number":
            if not math.isfinite(float(token.text)):
                raise self._error("a number that is not too large")
            self._take()
            self._program.append(float(token.text))
        elif token.kind == "name" and self._after.text == "(":
            self._call()
        elif token.kind == "name":
            self._program.append(self._take().text)
        else:
            raise self._error("a number, a grader's key, a function or '('")

    def _call(self) -> None:
        name = self._token.text
        if name not in FUNCTIONS:
            raise self._error(f"one of the functions {', '.join(FUNCTIONS)}")
        self._take()
        count = 0
        while not count or self._token.text == ",":
            self._take()
            self._expression()
            count += 1
        if count > 1 and name not in _ANY_COUNT:
            raise FormulaError(f"{name} of {count} numbers; want one")
        self._expect(")")
        self._program.append(_Apply(FUNCTIONS[name], count))

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    @property
    def _after(self) -> _Token:
        return self._tokens[min(self._next + 1, len(self._tokens) - 1)]

    def _take(self) -> _Token:
        self._next += 1
        return self._tokens[self._next - 1]

    def _expect(self, text: str) -> None:
        if self._token.text != text:
            raise self._error(f"'{text}'")
        self._take()

    def _error(self, wanted: str) -> FormulaError:
        token = self._token
        if token.kind == "end":
            return FormulaError(f"the formula ends too early; want {wanted}")
        before = self._tokens[self._next - 1] if self._next else None
        twice = (
            token.text == "*"
            and before is not None
            and (before.text, before.column) == ("*", token.column - 1)
        )
        hint = "; a power is written ^" if twice else ""
        return FormulaError(f"{token.text!r} at column {token.column}; want {wanted}{hint}")


def _tokens(text: str) -> Iterator[_Token]:
    place = 0
    end = len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            place += len(text[place:]) - len(text[place:].lstrip())
            raise FormulaError(
                f"{text[place]!r} at column {place + 1}; want numbers, graders' keys, + - * / ^ ( ) and "
                f"the functions {', '.join(FUNCTIONS)}"
            )
        kind: Literal["number", "name", "sign"] = match.lastgroup  # pyright: ignore[reportAssignmentType]
        yield _Token(kind, match[kind], match.start(kind) + 1)
        place = match.end()
    yield _Token("end", "", end + 1)


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in values.items())
