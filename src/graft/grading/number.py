"""Numbers in text: the last one of a completion against the row's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from graft.errors import DataError
from graft.types import Grade, Outcome, Sample

_NUMBER = re.compile(
    r"(?<![\d.])"  # not inside another number
    r"(?P<sign>(?<![\d)\]])[-−+])?"  # a sign, unless it subtracts from what stands before it
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"  # 1,234,567 or 1234567 or nothing before .5
    r"(?P<fraction>\.\d+)?"
)


_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")


def numbers_in(text: str) -> list[Decimal]:
    """All decimal numbers in a text, in order.

    A comma with three digits after it groups thousands, any other separates: `1,234` is one number, `(3,4)` holds 3 and
    4. `7-5` holds 7 and 5, `= -5` holds -5.
    """
    found = []
    for match in _NUMBER.finditer(text):
        sign = "-" if match["sign"] in ("-", "−") else ""
        found.append(Decimal(sign + match["digits"].replace(",", "") + (match["fraction"] or "")))
    return found


def as_number(value: Any) -> Decimal | None:
    """A row's value as a number: a JSON number, or text that is one number; None for anything else."""
    if isinstance(value, bool):
        return None
    text = str(value).strip().replace("−", "-")
    try:
        number = Decimal(text.replace(",", "") if _GROUPED.fullmatch(text) else text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


class NumberGrader:
    """1 if the last number of the completion equals the number in the row's key, else 0."""

    def __init__(self, key: str) -> None:
        """
        Args:
            key: of the row's item that holds the right number.
        """
        self.key = key

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        """Grade each sample.

        Raises:
            DataError: a row has no such key, or it holds no number.
        """
        return [self._grade(sample) for sample in samples]

    def _grade(self, sample: Sample) -> Grade:
        wanted = as_number(sample.prompt.item.get(self.key))
        if wanted is None:
            got = repr(sample.prompt.item[self.key]) if self.key in sample.prompt.item else "no such key"
            raise DataError(
                f"grader 'number', row {sample.prompt.row}: item.{self.key} must hold a number, got {got}. "
                f"Keys of the row: {', '.join(sorted(sample.prompt.item))}. Set grader.key."
            )
        numbers = numbers_in(sample.text)
        if not numbers:
            return Grade(0.0, Outcome.UNPARSEABLE, reason="no number in the completion")
        return Grade(float(numbers[-1] == wanted), reason=f"last number {numbers[-1]}, wanted {wanted}")
