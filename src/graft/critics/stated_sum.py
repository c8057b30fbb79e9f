"""A question that states a sum, `5 - 8 - 1 - 6`: its terms have signs, and a step puts one number in place of some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

from graft.critics.arithmetic import Equation, sums_in
from graft.critics.question import numbers_given
from graft.critics.symbols import show

FEWEST_TERMS = 3
"""Of a stated sum: `2-3 days` is none."""


def stated_sum(question: str) -> tuple[Fraction, ...] | None:
    """The terms of the sum that a question states, if its numbers are those of one sum and no others."""
    sums = sums_in(question)
    if len(sums) != 1 or sums[0].terms is None or len(sums[0].terms) < FEWEST_TERMS:
        return None
    given = numbers_given(question).numbers
    return sums[0].terms if given == Counter(number.value for number in sums[0].numbers) else None


class TermsLeft:
    """The terms of a sum, as the lines of a chain add them up.

    A line that adds up terms which are there is a step of the sum, whether its result is right or wrong: the result
    takes their place. Any other line, however true, changes nothing: in `5 - 8 - 1`, after `5 - 8 = -3`, the step is
    `-3 - 1`, not `3 - 1` and not `5 - 1`.
    """

    def __init__(self, terms: Iterable[Fraction]) -> None:
        self._left = Counter(terms)
        self._unused = self._left.copy()  # of the question's own, by right steps
        self._numbers = self._unused.total()

    @property
    def share_used(self) -> float:
        """Of the question's terms, by right steps."""
        return 1 - self._unused.total() / self._numbers

    def take(self, equation: Equation) -> list[str]:
        """Enter an equation; what speaks against its being a step."""
        terms = Counter(equation.computed.terms or ())
        if not terms or not terms <= self._left:
            left = ", ".join(show(term) for term in sorted(self._left.elements()))
            return [f"{equation.computed.text} does not add up what is left: {left}"]
        self._left -= terms
        self._left[equation.claimed.value] += 1
        if equation.holds:
            self._unused -= terms
        return []
