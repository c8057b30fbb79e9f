"""Grading completions that are there already: no model, no tree."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from graft.grading.build import BuiltGrader
from graft.types import Grade, Prompt, Sample, StopReason


def sample_of_text(
    text: str, item: Mapping[str, Any], *, row: int = 0, stop: StopReason = StopReason.EOS
) -> Sample:
    """A completion of a row as graders see it; its length in tokens is not known and 0."""
    prompt = Prompt(row=row, messages=(), item=item, tokens=np.array([], np.int32), question="")
    return Sample(prompt=prompt, text=text, tokens=0, stop=stop)


def grade_all(grader: BuiltGrader, samples: Sequence[Sample]) -> list[tuple[Grade, float]]:
    """Each sample's grade and the seconds that it took, as many at a time as the grader allows.

    Raises:
        GraftError: what the grader raises.
    """

    def grade(sample: Sample) -> tuple[Grade, float]:
        began = time.perf_counter()
        [one] = grader([sample])
        return one, time.perf_counter() - began

    with ThreadPoolExecutor(grader.calls_at_once, thread_name_prefix="graft-grading") as threads:
        return list(threads.map(grade, samples))
