"""Grading completions that are there already: no model, no tree."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
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

    The threads are daemons: who stops the command waits for no service.

    Raises:
        GraftError: what the grader raises; no further samples are asked about.
    """
    graded: list[Future[tuple[Grade, float]]] = [Future() for _ in samples]
    waiting: queue.SimpleQueue[tuple[Sample, Future[tuple[Grade, float]]]] = queue.SimpleQueue()
    for entry in zip(samples, graded, strict=True):
        waiting.put(entry)
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                sample, future = waiting.get_nowait()
            except queue.Empty:
                return
            began = time.perf_counter()
            try:
                [one] = grader([sample])
                future.set_result((one, time.perf_counter() - began))
            except BaseException as error:
                over.set()
                future.set_exception(error)

    for _ in range(min(grader.calls_at_once, len(samples))):
        threading.Thread(target=work, daemon=True, name="graft-grading").start()
    try:
        return [future.result() for future in graded]
    finally:
        over.set()
