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

    def __init__(self, terms: Iterable[Fraction], *, in_order: bool = False) -> None:
        """
        Args:
            terms: of the sum.
            in_order: whether a step has to add up the first of those that are left.
        """
        self._left = list(terms)
        self._in_order = in_order
        self._unused = Counter(self._left)  # of the question's own, by right steps
        self._numbers = self._unused.total()

    @property
    def share_used(self) -> float:
        """Of the question's terms, by right steps."""
        return 1 - self._unused.total() / self._numbers

    def take(self, equation: Equation) -> list[str]:
        """Enter an equation; what speaks against its being a step."""
        terms = Counter(equation.computed.terms or ())
        candidates = self._left[: terms.total()] if self._in_order else self._left
        if not terms or not terms <= Counter(candidates):
            left = ", ".join(map(show, self._left))
            which = "first of the terms" if self._in_order else "terms"
            return [f"{equation.computed.text} does not add up the {which} that are left: {left}"]
        for term in terms.elements():
            self._left.remove(term)
        self._left.insert(0, equation.claimed.value)
        if equation.holds:
            self._unused -= terms
        return []
