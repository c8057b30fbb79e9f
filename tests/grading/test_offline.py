"""Completions that are there already, graded side by side."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from graft.errors import GraderError
from graft.grading.build import BuiltGrader
from graft.grading.offline import grade_all
from graft.types import Grade, Sample
from tests.grading.samples import sample


def built(grade, calls_at_once: int) -> BuiltGrader:
    return BuiltGrader(grade, calls_at_once=calls_at_once, held=ExitStack())


def test_grades_come_in_the_order_of_the_samples():
    both = threading.Barrier(2)  # broken, were they judged one after the other

    def grade(samples: Sequence[Sample]) -> list[Grade]:
        both.wait(20)
        return [Grade(float(each.text)) for each in samples]

    graded = grade_all(built(grade, 2), [sample(str(number)) for number in range(6)])
    assert [one.score for one, _ in graded] == [0, 1, 2, 3, 4, 5]
    assert all(seconds >= 0 for _, seconds in graded)


def test_nothing_to_grade():
    assert grade_all(built(lambda samples: [], 4), []) == []


def test_what_a_grader_raises_ends_it_and_no_more_are_asked():
    asked = []

    def grade(samples: Sequence[Sample]) -> list[Grade]:
        asked.append(samples)
        raise GraderError("mend the row")

    with pytest.raises(GraderError, match="mend the row"):
        grade_all(built(grade, 1), [sample("a"), sample("b"), sample("c")])
    assert len(asked) == 1


def test_ctrl_c_waits_for_no_judge():
    """A judge may hang for minutes; whoever stops the command has stopped it."""
    release, ended = threading.Event(), []

    def grade(samples: Sequence[Sample]) -> list[Grade]:
        if samples[0].text == "hangs":
            _thread.interrupt_main()
            release.wait(10)
            ended.append(samples)
        return [Grade(1.0)]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            grade_all(built(grade, 1), [*[sample("a")] * 50, sample("hangs")])
        assert ended == []
    finally:
        release.set()
        signal.signal(signal.SIGINT, before)
