"""Worked completions for reasoning-gym's `chain_sum`: one operation a line, then the answer."""

import re
from collections.abc import Mapping
from typing import Any


def worked(item: Mapping[str, Any]) -> str:
    """`4 - 1 - 7 =` becomes `4 - 1 = 3`, `3 - 7 = -4`, `Answer: -4`, a line each."""
    expression = re.search(r"(\d[\d\s+-]*)=", item["question"])
    if expression is None:
        raise ValueError(f"no sum in {item['question']!r}")
    first, *rest = re.findall(r"[+-]?\s*\d+", expression[1])
    total = int(first)
    lines = []
    for term in rest:
        sign, number = term[0], int(term[1:])
        result = total + number if sign == "+" else total - number
        lines.append(f"{total} {sign} {number} = {result}")
        total = result
    return "\n".join([*lines, f"Answer: {total}"])
