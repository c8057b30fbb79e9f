"""The critic `equations`: does every equation of a thought hold, and do its numbers come from somewhere?

S_k = B x share of right equations in thought k, times `unknown_operand_factor` if an operand is neither in the prompt
nor a result written before; B/2 without an equation. Where the question states a sum, `stated_sum.py` keeps its terms,
and the factor is for equations that do not add up terms that are left.
P_k = B x (numbers of the question that right equations have used so far) / (numbers in the question), each occurrence
counted once; B/2 where the question has none.
G = B x the grade's score.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from graft.critics.arithmetic import Equation, equations_in
from graft.critics.question import Given, numbers_given, readings
from graft.critics.scores import overall_score, share_of_time
from graft.critics.stated_sum import TermsLeft, stated_sum
from graft.critics.symbols import show
from graft.data.rows import text_of
from graft.types import Chain, Critique


class EquationsCritic:
    """Checks arithmetic. Needs no model; a line takes a fraction of a millisecond."""

    def __init__(
        self,
        *,
        scale: float,
        unknown_operand_factor: float,
        sum_order: Literal["any", "left_to_right"] = "any",
    ) -> None:
        """
        Args:
            scale: B, the highest score.
            unknown_operand_factor: what a thought with an operand from nowhere keeps of its score.
            sum_order: in which the terms of a stated sum may be added up.
        """
        self._scale, self._factor, self._in_order = (
            scale,
            unknown_operand_factor,
            sum_order == "left_to_right",
        )

    def __call__(self, chains: Sequence[Chain]) -> list[Critique]:
        """Critiques in the order of the chains."""
        began = time.perf_counter()
        return share_of_time([self._judge(chain) for chain in chains], began)

    def _judge(self, chain: Chain) -> Critique:
        question = " ".join(chain.prompt.question.split())  # a line break within a sum is no end of it
        terms = stated_sum(question)
        if terms is None:
            earlier = [text_of(message["content"]) for message in chain.prompt.earlier]
            record = _Record(numbers_given(question), [numbers_given(text) for text in earlier])
        else:
            record = TermsLeft(terms, in_order=self._in_order)
        thoughts, progress, reasons = [], [], []
        for text in chain.thoughts:
            equations = equations_in(text)
            wrong = [equation for equation in equations if not equation.holds]
            problems = [problem for equation in equations for problem in record.take(equation)]
            score = 1 - len(wrong) / len(equations) if equations else 0.5
            thoughts.append(self._scale * score * (self._factor if problems else 1.0))
            progress.append(self._scale * record.share_used)
            reasons.append(_reason(equations, wrong, problems))
        return Critique(
            overall=overall_score(chain.grade, self._scale),
            thoughts=tuple(thoughts),
            progress=tuple(progress),
            reasons=tuple(reasons),
        )


class _Record:
    """What can be computed with, and what has been used, as the chain goes on."""

    def __init__(self, given: Given, earlier: Sequence[Given]) -> None:
        self._numbers = sum(given.numbers.values())
        self._left = Counter(given.numbers)
        self._known: set[Fraction] = {
            number for each in (given, *earlier) for number in (*each.numbers, *each.implied)
        }

    @property
    def share_used(self) -> float:
        """Of the question's numbers; one half where it has none."""
        return 1 - self._left.total() / self._numbers if self._numbers else 0.5

    def take(self, equation: Equation) -> list[str]:
        """Enter an equation; what speaks against its operands."""
        operands = equation.computed.numbers
        unknown = [number for number in operands if not self._known.intersection(readings(number))]
        if equation.holds:
            for number in operands:
                value = next((value for value in readings(number) if self._left[value]), None)
                if value is not None:
                    self._left[value] -= 1
            for number in equation.claimed.numbers:  # of an expression: what was computed on the way to it
                self._known.update(readings(number))
        for side in (equation.left, equation.right):
            self._known |= {side.value, side.plain}
        return [f"{number} is neither in the question nor a result before" for number in unknown]


def _reason(equations: Sequence[Equation], wrong: Sequence[Equation], problems: Sequence[str]) -> str:
    if not equations:
        return "no equation"
    parts = [
        f"{equation} is wrong: {equation.computed.text} = {show(equation.computed.value)}"
        for equation in wrong
    ]
    return "; ".join([*parts, *dict.fromkeys(problems)])
