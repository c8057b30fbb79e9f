"""Grading beside sampling: what was handed over early, what was not, and what goes wrong on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from graft.errors import GraderError
from graft.grading.beside import GradingBeside
from graft.rollout.engine import Continuation
from graft.tree import ROOT, Kind, Tree
from graft.types import Grade, Outcome, Prompt, Sample, StopReason

LONG = 60.0  # seconds; never waited for


def decode(tokens: np.ndarray) -> str:
    return "-".join(map(str, tokens.tolist()))


def prompt(row: int) -> Prompt:
    return Prompt(row=row, messages=(), item={}, tokens=np.array([1], np.int32), question=str(row))


PROMPTS = [prompt(7), prompt(8)]


def ended(*tokens: int, stop: StopReason = StopReason.EOS) -> Continuation:
    return Continuation(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), stop)


ROUND = [[ended(10), ended(11, 12, stop=StopReason.LENGTH)], [ended(20), ended(21)]]


def trees() -> list[Tree]:
    grown = []
    for own, samples in zip(PROMPTS, ROUND, strict=True):
        tree = Tree(own)
        group = tree.new_group()
        for c in samples:
            tree.add(ROOT, c.tokens, c.logprobs, group=group, kind=Kind.COMPLETION, stop=c.stop)
        grown.append(tree)
    return grown


class Recording:
    """The first token as score; keeps what it was asked."""

    def __init__(
        self, calls_at_once: int = 1, before: Callable[[Sample], object] = lambda sample: None
    ) -> None:
        self.calls_at_once = calls_at_once
        self.asked: list[Sample] = []
        self.lock = threading.Lock()
        self.before = before

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        with self.lock:
            self.asked += samples
        for sample in samples:
            self.before(sample)
        return [Grade(float(sample.text.split("-")[0])) for sample in samples]


WANTED = [{1: 10.0, 2: 11.0}, {1: 20.0, 2: 21.0}]


def scores(grades: Sequence) -> list[dict[int, float | None]]:
    return [{leaf: grade.score for leaf, grade in own.items()} for own in grades]


@pytest.mark.parametrize("handed", [[], [(1, 1), (0, 0)], [(1, 1), (0, 1), (1, 0), (0, 0)]], ids=len)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_leaf_gets_its_grade_once_whenever_it_was_handed_over(handed, threads):
    grader = Recording(threads)
    with GradingBeside(grader, decode) as beside:
        finished = beside.finished(PROMPTS)
        for index, place in handed:
            finished(index, place, ROUND[index][place])
        assert scores(beside.grades(trees(), max_failure_rate=0.0)) == WANTED
    assert sorted(sample.text for sample in grader.asked) == ["10", "11-12", "20", "21"]
    by_text = {sample.text: sample for sample in grader.asked}
    assert by_text["11-12"].stop is StopReason.LENGTH
    assert by_text["11-12"].tokens == 2
    assert by_text["11-12"].prompt is PROMPTS[0]
    if threads == 1:  # in the order of finishing, then of the trees
        order = [decode(ROUND[i][j].tokens) for i, j in handed]
        assert [sample.text for sample in grader.asked][: len(order)] == order


def test_grading_has_begun_before_sampling_ends():
    begun = threading.Event()
    grader = Recording(before=lambda sample: begun.set())
    with GradingBeside(grader, decode) as beside:
        beside.finished(PROMPTS)(0, 0, ROUND[0][0])
        assert begun.wait(LONG)
        assert scores(beside.grades(trees(), max_failure_rate=0.0)) == WANTED


def test_the_engine_is_not_kept_waiting_and_samples_are_judged_side_by_side():
    """No sample is judged before all four are asked about: that needs four threads and an engine that goes on."""
    together = threading.Barrier(4, timeout=LONG)
    grader = Recording(4, before=lambda sample: together.wait())
    with GradingBeside(grader, decode) as beside:
        finished = beside.finished(PROMPTS)
        for index, samples in enumerate(ROUND):
            for place, one in enumerate(samples):
                finished(index, place, one)
        assert scores(beside.grades(trees(), max_failure_rate=0.0)) == WANTED


def test_a_grader_that_raises_stops_sampling_and_the_wait():
    raised = threading.Event()

    def fail(sample: Sample) -> None:
        raised.set()
        raise GraderError("the row has no answer")

    with GradingBeside(Recording(before=fail), decode) as beside:
        finished = beside.finished(PROMPTS)
        finished(0, 0, ROUND[0][0])
        with pytest.raises(GraderError, match="the row has no answer"):
            beside.grades(trees(), max_failure_rate=1.0)
        with pytest.raises(GraderError, match="the row has no answer"):
            finished(0, 1, ROUND[0][1])
    assert raised.is_set()


def test_too_many_failures_stop_the_run():
    def grader(samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(0.0, Outcome.CRASHED, reason="down") for _ in samples]  # a failure that scores 0

    with (
        GradingBeside(grader, decode) as beside,
        pytest.raises(GraderError, match=r"4 of 4 .*4 x crashed: down"),
    ):
        beside.grades(trees(), max_failure_rate=0.5)


def test_the_user_may_stop_the_wait():
    release = threading.Event()
    looks = []

    class Stopped(Exception):  # noqa: N818 - what the loop raises is no error either
        pass

    def waiting() -> None:
        looks.append(1)
        if len(looks) == 2:
            raise Stopped

    grader = Recording(before=lambda sample: release.wait(LONG))
    with pytest.raises(Stopped), GradingBeside(grader, decode) as beside:
        beside.grades(trees(), max_failure_rate=0.0, waiting=waiting)
    release.set()
    assert len(grader.asked) == 1  # what was waiting is not asked about any more


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_grades_is_refused(count):
    wrong = GradingBeside(lambda samples: [Grade(1.0)] * count, decode)
    with wrong as beside, pytest.raises(GraderError, match=f"{count} grades for 1 sample"):
        beside.grades(trees(), max_failure_rate=1.0)


def test_no_trees_start_no_thread():
    before = threading.active_count()
    with GradingBeside(Recording(), decode) as beside:
        assert beside.grades([], max_failure_rate=0.0) == []
    assert threading.active_count() == before
