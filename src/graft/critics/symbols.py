"""Prose -> the symbols of arithmetic in it. Units behind numbers are dropped; any other word breaks an expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction


class Kind(StrEnum):
    """What a symbol is."""

    NUMBER = "number"
    OPERATOR = "operator"
    OPEN = "open"
    CLOSE = "close"
    EQUALS = "equals"
    WORD = "word"
    BREAK = "break"  # punctuation, a new line, anything that ends an expression


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it stands in a text."""

    value: Fraction
    """Without regard to what `hundredths` says."""

    decimals: int = 0
    """Digits after the decimal point."""

    hundredths: bool = False
    """Percent or cents."""

    def __str__(self) -> str:
        return show(self.value) + ("%" if self.hundredths else "")


@dataclass(frozen=True, slots=True)
class Symbol:
    """A piece of a text; `text` is in the parser's spelling for operators."""

    kind: Kind
    text: str
    number: Number | None = None
    spaced: bool = False
    """Whether white space follows."""

    glued: bool = False
    """Whether nothing stands between it and the symbol before."""

    unit: bool = False
    """Whether a unit stood behind it."""


END = Symbol(Kind.BREAK, "")
BREAK = Symbol(Kind.BREAK, "…")
"""In place of words that belong to no number."""

VARIABLE = Symbol(Kind.BREAK, "variable")
"""In place of a letter or word that makes another value of the number before it: `7x`, `3 R 2`."""

LONGEST_UNIT = 8
"""Words that may follow a number as its unit."""

_REWRITTEN = (
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![a-z])"), "×"),
    (re.compile(r"\\div(?![a-z])"), "÷"),
    (re.compile(r"\\approx(?![a-z])"), "≈"),
    (re.compile(r"\\(?:left|right|quad|[,;!])"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\*\*|`"), " "),
    (re.compile(r"(?<=\d)\$|\$(?!\s?[\d.])"), " "),  # LaTeX's delimiters
)
"""LaTeX's and Markdown's commonest spellings, in plain ones."""

_SYMBOL = re.compile(
    r"(?P<mixed>(?<![\d.,/])\d+ (?:and )?\d+/\d+(?![\d/]))"
    r"|(?P<number>(?:[$€£]\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:\s?[%¢])?)"
    r"|(?P<arrow>[=\-–]+>|⇒|→|[<>!]=?|==+)"
    r"|(?P<equals>[=≈])"
    r"|(?P<operator>[-+*/×÷·∙–—−])"
    r"|(?P<open>[(\[])|(?P<close>[)\]])"
    r"|(?P<word>[^\W\d_]+(?:[-'’][^\W\d_]+)*)"
    r"|(?P<break>[^ \t])"
)
_OPERATORS = {
    **dict.fromkeys("-–—−", "-"),
    **dict.fromkeys("*×·∙", "*"),
    **dict.fromkeys("/÷", "/"),
    "+": "+",
}
_SPOKEN = {"x": "*", "times": "*", "plus": "+", "minus": "-"}
_DETERMINERS = frozenset(
    [
        "the",
        "a",
        "an",
        "another",
        "his",
        "her",
        "their",
        "its",
        "those",
        "these",
        "all",
        "each",
        "every",
        "only",
    ]
)
_LETTER_UNITS = frozenset("gmhl")
"""Letters that may be a unit right behind a number."""

_VARIABLES = frozenset("xyznr")
"""Letters that are none even after a space; `r` for a remainder."""

_HUNDREDTHS = frozenset({"cent", "cents", "percent"})


def show(value: Fraction) -> str:
    """A number for people: exact where it ends, else with four digits."""
    decimal = f"{float(value):.10g}"
    return decimal if Fraction(decimal) == value else f"{float(value):.4g}"


def symbols_in(text: str) -> list[Symbol]:
    """The symbols of a text, units dropped, words that belong to no number made breaks."""
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return _without_words(_with_spoken_operators(_split(text)))


def _split(text: str) -> list[Symbol]:
    found: list[Symbol] = []
    end = -1
    for match in _SYMBOL.finditer(text):
        kind, piece = str(match.lastgroup), match[0]
        spaced = text[match.end() : match.end() + 1].isspace()
        symbol = _symbol(kind, piece)
        found.append(replace(symbol, spaced=spaced, glued=match.start() == end))
        end = match.end()
    return found


def _symbol(kind: str, piece: str) -> Symbol:
    if kind in ("number", "mixed"):
        return Symbol(Kind.NUMBER, piece.strip(), _number(piece))
    if kind == "operator":
        return Symbol(Kind.OPERATOR, _OPERATORS[piece])
    if kind == "arrow":
        return Symbol(Kind.BREAK, piece)
    return Symbol(Kind(kind), piece)


def _number(piece: str) -> Number:
    digits = piece.strip("$€£%¢ \t\n").replace(",", "")
    if "/" in digits:
        whole, fraction = digits.replace("and", "").split()
        return Number(int(whole) + Fraction(fraction))
    return Number(Fraction(digits), decimals=len(digits.partition(".")[2]), hundredths=piece[-1] in "%¢")


def _with_spoken_operators(symbols: Sequence[Symbol]) -> list[Symbol]:
    """`3 x 4`, `3 times 4`, `20% of 50`, `1/4 of the 20` with signs; a determiner behind an operator left out."""
    found: list[Symbol] = []
    for place, symbol in enumerate(symbols):
        word = symbol.text.lower() if symbol.kind is Kind.WORD else ""
        following = symbols[place + 1 : place + 3]
        if word in _SPOKEN and found and _starts_operand(following):
            symbol = replace(symbol, kind=Kind.OPERATOR, text=_SPOKEN[word])
        elif (
            word == "of"
            and _is_share(found)
            and (
                _starts_operand(following)
                or (
                    following[:1]
                    and following[0].text.lower() in _DETERMINERS
                    and _starts_operand(following[1:])
                )
            )
        ):
            symbol = replace(symbol, kind=Kind.OPERATOR, text="*")
        elif (
            word in _DETERMINERS and found and found[-1].kind is Kind.OPERATOR and _starts_operand(following)
        ):
            continue
        found.append(symbol)
    return found


def _without_words(symbols: Sequence[Symbol]) -> list[Symbol]:
    """Units gone, other words breaks."""
    found: list[Symbol] = []
    place = 0
    while place < len(symbols):
        symbol = symbols[place]
        unit = _unit_length(symbols, place) if _ends_operand(found) else 0
        if unit:
            number = found[-1].number
            if number is not None and symbol.text.lower() in _HUNDREDTHS:
                number = replace(number, hundredths=True)
            found[-1] = replace(found[-1], number=number, unit=True)
            place += unit
            continue
        if symbol.kind is Kind.WORD:
            symbol = VARIABLE if _ends_operand(found) and _is_variable(symbol) else BREAK
        found.append(symbol)
        place += 1
    return found


def _unit_length(symbols: Sequence[Symbol], place: int) -> int:
    """How many symbols from `place` on are the unit of the number before; 0: none, or words that are no unit."""
    end = place
    while end < len(symbols) and end - place <= 2 * LONGEST_UNIT:
        symbol, after = symbols[end], symbols[end + 1] if end + 1 < len(symbols) else END
        joins = symbol.kind is Kind.OPERATOR and symbol.text in "/-" and after.kind is Kind.WORD
        if symbol.kind is Kind.WORD:
            end += 1
        elif joins and (symbol.text == "/" or (symbol.glued and not symbol.spaced)):  # dollars/hour, 3-page
            end += 2
        else:
            break
    words = symbols[place:end]
    if not words or sum(word.kind is Kind.WORD for word in words) > LONGEST_UNIT or _is_variable(words[0]):
        return 0
    follows = symbols[end] if end < len(symbols) else END
    return end - place if follows.kind in (Kind.OPERATOR, Kind.EQUALS, Kind.CLOSE, Kind.BREAK) else 0


def _is_variable(word: Symbol) -> bool:
    text = word.text.lower()
    if word.kind is not Kind.WORD or len(text) > 1:
        return text == "remainder"
    return text in _VARIABLES or (word.glued and text not in _LETTER_UNITS)


def _is_share(symbols: Sequence[Symbol]) -> bool:
    """Whether a percentage or a fraction stands at the end."""
    if not _ends_operand(symbols):
        return False
    number = symbols[-1].number
    return (number is not None and number.hundredths) or (
        len(symbols) > 2 and symbols[-2].text == "/" and symbols[-3].kind is Kind.NUMBER
    )


def _ends_operand(symbols: Sequence[Symbol]) -> bool:
    return bool(symbols) and symbols[-1].kind in (Kind.NUMBER, Kind.CLOSE)


def _starts_operand(symbols: Sequence[Symbol]) -> bool:
    return bool(symbols) and symbols[0].kind in (Kind.NUMBER, Kind.OPEN)
