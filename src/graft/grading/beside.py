"""Grading beside sampling: finished samples are judged on other threads while the engine goes on with the rest.

with GradingBeside(grader, decode) as beside:
    trees = grow_groups(..., finished=beside.finished(prompts))
    grades = beside.grades(trees, max_failure_rate=0.1)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from graft.errors import GraderError
from graft.grading.grade import LeafGrades, sample_of, settle
from graft.tree import Tree
from graft.types import Grade, Grader, Prompt, Sample, StopReason, Tokens

LOOK_EVERY_S = 0.2
"""How often the wait for grades looks whether the user wants to stop."""

Place = tuple[int, int]
"""Index of the prompt, and of the sample among those of the prompt."""


class Finished(Protocol):
    """What the engine hands over when a sample has ended."""

    @property
    def tokens(self) -> Tokens: ...
    @property
    def stop(self) -> StopReason: ...


class GradingBeside:
    """Grades the samples of one round of sampling. The threads are daemons: a hanging service keeps nobody."""

    def __init__(self, grader: Grader, decode: Callable[[Tokens], str]) -> None:
        """
        Args:
            grader: asked about one sample at a time, about `grader.calls_at_once` (default: 1) at the same time.
            decode: token ids -> text.
        """
        self._grader, self._decode = grader, decode
        self._threads = getattr(grader, "calls_at_once", 1)
        self._waiting: queue.SimpleQueue[tuple[Sample, Future[Grade]] | None] = queue.SimpleQueue()
        self._grades: dict[Place, Future[Grade]] = {}
        self._started = 0
        self._over = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> GradingBeside:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for _thread in range(self._started):
            self._waiting.put(None)

    def finished(self, prompts: Sequence[Prompt]) -> Callable[[int, int, Finished], None]:
        """What the engine calls with the prompt's index, the sample's place in its group and the sample.

        It raises what the grader raised about an earlier sample, so that nothing more is sampled in vain.
        """

        def finished(index: int, place: int, ended: Finished) -> None:
            if self._error is not None:
                raise self._error
            text = self._decode(ended.tokens)
            self._add((index, place), Sample(prompts[index], text, len(ended.tokens), ended.stop))

        return finished

    def grades(
        self,
        trees: Sequence[Tree],
        *,
        max_failure_rate: float,
        waiting: Callable[[], None] = lambda: None,
    ) -> list[LeafGrades]:
        """Wait for the grades of all samples; what was not handed over before is graded now.

        Args:
            trees: in the order of the prompts; the leaves of each in the order of their places.
            max_failure_rate: largest share of samples that could not be graded.
            waiting: called now and then; raises if the user wants to stop.

        Raises:
            GraderError: as `settle`; or whatever the grader raises.
        """
        for index, tree in enumerate(trees):
            for place, leaf in enumerate(tree.endings()):
                if (index, place) not in self._grades:
                    self._add((index, place), sample_of(tree, leaf, self._decode))
        places = [(index, place) for index, tree in enumerate(trees) for place in range(len(tree.endings()))]
        pending = {self._grades[place] for place in places}
        while pending:
            waiting()
            done, pending = wait(pending, timeout=LOOK_EVERY_S)
            for grade in done:
                grade.result()
        return settle(
            trees, [self._grades[place].result() for place in places], max_failure_rate=max_failure_rate
        )

    def _add(self, place: Place, sample: Sample) -> None:
        future: Future[Grade] = Future()
        self._grades[place] = future
        self._waiting.put((sample, future))
        if self._started < self._threads:
            self._started += 1
            threading.Thread(target=self._work, daemon=True, name="graft-grading").start()

    def _work(self) -> None:
        while (entry := self._waiting.get()) is not None:
            sample, future = entry
            if self._over.is_set():
                future.cancel()
                continue
            try:
                future.set_result(_one(self._grader, sample))
            except BaseException as error:
                self._error = error
                future.set_exception(error)


def _one(grader: Any, sample: Sample) -> Grade:
    grades = list(grader([sample]))
    if len(grades) != 1:
        raise GraderError(f"the grader returned {len(grades)} grades for 1 sample; want one each")
    return grades[0]
