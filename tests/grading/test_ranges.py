"""Between which numbers scores lie, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from graft.grading.check import parse_grader
from graft.grading.ranges import score_range

NUMBER = {"type": "number"}


def judge(low: float, high: float) -> dict[str, Any]:
    message = {"role": "user", "content": "{{sample.output_text}}"}
    return {"type": "score_model", "model": "m", "input": [message], "range": [low, high]}


def formula(text: str, **graders: Any) -> dict[str, Any]:
    return {"type": "multi", "graders": graders, "calculate_output": text}


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        (NUMBER, (0, 1)),
        (judge(0, 10), (0, 10)),
        (judge(-1, 1), (-1, 1)),
        (formula("x", x=judge(1, 5)), (1, 5)),
        (formula("x / 10", x=judge(0, 10)), (0, 1)),
        (formula("(x - 1) / 4", x=judge(1, 5)), (0, 1)),
        (formula("1 - x", x=judge(0, 10)), (-9, 1)),
        (formula("min(1, x)", x=judge(0, 10)), (0, 1)),
        (formula("x - x", x=judge(0, 10)), (0, 0)),
        (formula("0.5 * x + y", x=judge(0, 10), y=NUMBER), (0, 6)),
        (formula("y", x=judge(0, 10), y=NUMBER), (0, 1)),
        (formula("1 / x", x=judge(0, 4)), (0.25, 0.25)),  # at 0 there is no score
        (formula("1 / (x - x)", x=NUMBER), None),
        (formula("+".join(f"x{n}" for n in range(13)), **{f"x{n}": NUMBER for n in range(13)}), None),
        (
            {"type": "weighted", "graders": {"x": judge(0, 10), "y": NUMBER}, "weights": {"x": 2, "y": -3}},
            (-3, 20),
        ),
    ],
)
def test_range_of(spec, ends):
    assert score_range(parse_grader(spec)) == ends
