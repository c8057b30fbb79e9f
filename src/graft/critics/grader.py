"""Any grader as a critic: it judges each thought as if it were a completion.

S_k = B x its score of thought k alone; P_k = B x its score of thoughts 1 to k together; G = B x the grade's score.
Scores outside 0..1 count as the nearer end, in S and P.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from graft.critics.scores import clipped, failed, grade_each, overall_score, share_of_time, total_usage
from graft.types import Chain, Critique, Grade, Grader, Sample, StopReason


class GraderCritic:
    """Asks a grader twice a thought."""

    def __init__(self, grader: Grader, *, scale: float) -> None:
        """
        Args:
            grader: of texts.
            scale: B, the highest score.
        """
        self._grader, self._scale = grader, scale

    def __call__(
        self, chains: Sequence[Chain], *, waiting: Callable[[], None] | None = None
    ) -> list[Critique]:
        """Critiques in the order of the chains; `waiting` is called now and then and may raise to stop.

        Raises:
            GraftError: what the grader raises: a row lacks what it reads.
        """
        began = time.perf_counter()
        samples = [sample for chain in chains for sample in _samples(chain)]
        grades = iter(grade_each(self._grader, samples, waiting=waiting) if samples else [])
        own = [[next(grades) for _ in range(2 * len(chain.thoughts))] for chain in chains]
        return share_of_time([self._judge(*pair) for pair in zip(chains, own, strict=True)], began)

    def _judge(self, chain: Chain, grades: Sequence[Grade]) -> Critique:
        cost = {"calls": len(grades), "usage": total_usage(grades)}
        for grade in grades:
            if grade.failed:
                return failed(grade.outcome, grade.reason, **cost)
        scores = [clipped(float(grade.score or 0.0), self._scale) for grade in grades]
        count = len(chain.thoughts)
        return Critique(
            overall=overall_score(chain.grade, self._scale),
            thoughts=tuple(scores[:count]),
            progress=tuple(scores[count:]),
            reasons=tuple(grade.reason for grade in grades[:count]),
            **cost,
        )


def _samples(chain: Chain) -> list[Sample]:
    """The thoughts alone, and then what stands before the end of each."""
    lengths = [len(span) for span in chain.spans[: len(chain.thoughts)]]
    alone = [
        Sample(chain.prompt, text, length, StopReason.CUT)
        for text, length in zip(chain.thoughts, lengths, strict=True)
    ]
    so_far = [
        Sample(chain.prompt, "".join(chain.thoughts[:k]), sum(lengths[:k]), StopReason.CUT)
        for k in range(1, len(chain.thoughts) + 1)
    ]
    return alone + so_far
