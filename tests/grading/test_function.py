"""Functions that raise, hang, or return anything: an outcome each, and never a wrong score."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from graft.errors import GraderError
from graft.grading.function import MAX_ABANDONED, FunctionGrader
from graft.types import Grade, Outcome, Prompt, Sample, StopReason

LONG = 60.0  # seconds; never waited for
SHORT = 0.02


def sample(text: str = "text", **item) -> Sample:
    prompt = Prompt(row=0, messages=(), item=item, tokens=np.array([1], np.int32), question="")
    return Sample(prompt=prompt, text=text, tokens=5, stop=StopReason.LENGTH)


def grade_with(function: Callable[..., Any], *samples: Sample, timeout_s: float = LONG) -> list[Grade]:
    return FunctionGrader(function, timeout_s=timeout_s)(samples or [sample()])


def returning(value: Any) -> Callable[[str, dict], Any]:
    return lambda completion, item: value


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Is not set while a test runs; afterwards the threads that wait for it may go."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0),
        (0.25, 0.25),
        (-3, -3.0),
        (True, 1.0),
        (False, 0.0),
        (np.float32(0.5), 0.5),
        (torch.tensor(2.0), 2.0),
    ],
    ids=repr,
)
def test_a_number_is_a_score(value, score):
    [grade] = grade_with(returning(value))
    assert grade == Grade(score)
    assert type(grade.score) is float


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, np.float64("nan"), Grade(math.nan), Grade(math.inf)]
)
def test_a_number_that_is_not_finite_is_no_score(value):
    [grade] = grade_with(returning(value))
    assert grade.score is None
    assert grade.outcome is Outcome.NOT_FINITE
    assert "must be finite" in grade.reason


class BadNumber:
    def __float__(self) -> float:
        raise RuntimeError("no number today")

    def __repr__(self) -> str:
        return "BadNumber()"


@pytest.mark.parametrize(
    "value",
    [None, "right", [1.0], {}, 1j, 10**400, torch.zeros(2), BadNumber(), Grade("right")],  # pyright: ignore
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number_is_no_score(value):
    [grade] = grade_with(returning(value))
    assert grade.score is None
    assert grade.outcome is Outcome.CRASHED
    assert "returned" in grade.reason


@pytest.mark.parametrize(
    "given",
    [
        Grade(0.5, parts={"format": 1.0}, reason="half right"),
        Grade(0.0, Outcome.UNPARSEABLE, reason="no tag"),
        Grade(None, Outcome.TIMED_OUT, reason="the service did not answer"),
    ],
)
def test_a_grade_is_handed_on_as_it_is(given):
    assert grade_with(returning(given)) == [given]


@pytest.mark.parametrize(
    "error", [ValueError("no tag"), SystemExit(3), KeyboardInterrupt(), AssertionError()]
)
def test_a_call_that_raises_is_no_score_and_harms_no_other(error):
    def grader(completion: str, item: dict) -> float:
        if completion == "bad":
            raise error
        return 1.0

    before, failed, after = grade_with(grader, sample("good"), sample("bad"), sample("good"))
    assert before.score == after.score == 1.0
    assert failed.score is None
    assert failed.outcome is Outcome.CRASHED
    assert type(error).__name__ in failed.reason
    assert "grader" in failed.reason


def test_what_the_function_is_called_with():
    calls = []

    def two(completion, item):
        calls.append((completion, item))
        item["answer"] = "changed"  # a copy: the row stays
        return 0

    given = sample("the text", answer="4")
    assert FunctionGrader(two, timeout_s=LONG)([given])[0].score == 0
    assert calls[0][0] == "the text"
    assert given.prompt.item == {"answer": "4"}

    def three(completion, item, sample):
        return float(sample.stop is StopReason.LENGTH and sample is given and item == {"answer": "4"})

    assert FunctionGrader(three, timeout_s=LONG)([given])[0].score == 1.0


class Callable2:
    def __call__(self, completion, item):
        return len(completion)

    def method(self, completion, item, sample):
        return sample.tokens


@pytest.mark.parametrize(
    ("function", "score"),
    [
        (lambda completion, item: 2, 2.0),
        (lambda completion, item, *, strict=True: float(strict), 1.0),
        (lambda *arguments: len(arguments), 3.0),
        (lambda completion, item, scale=4: scale, 4.0),  # a default is the function's own
        (lambda completion, item, sample=None: getattr(sample, "tokens", 0), 5.0),
        (lambda completion, item, third, scale=4: third.tokens, 5.0),
        (Callable2(), 4.0),
        (Callable2().method, 5.0),
        (max, None),  # a built-in without a usable signature; cannot compare text with a dict
    ],
)
def test_anything_that_can_be_called(function, score):
    [grade] = grade_with(function)
    assert grade.score == score


def test_a_closure_keeps_its_state_from_call_to_call():
    seen = []

    def novelty(completion: str, item: dict) -> int:
        seen.append(completion)
        return len(set(seen))

    grader = FunctionGrader(novelty, timeout_s=LONG)
    assert [g.score for g in grader([sample("a"), sample("b")])] == [1.0, 2.0]
    assert [g.score for g in grader([sample("a"), sample("c")])] == [2.0, 3.0]


@pytest.mark.parametrize(
    "function", [lambda: 1, lambda completion: 1, lambda a, b, c, d: 1, lambda a, b, *, needed: 1]
)
def test_a_wrong_signature_is_refused_before_anything_runs(function):
    with pytest.raises(GraderError, match=r"lambda.*want function\(completion, item\) or"):
        FunctionGrader(function, timeout_s=LONG)


def test_a_call_that_hangs_is_no_score_and_the_next_one_runs(never):
    def grader(completion: str, item: dict) -> float:
        if completion == "hang":
            never.wait()
        return 1.0

    first, hung, last = grade_with(grader, sample("go"), sample("hang"), sample("go"), timeout_s=SHORT)
    assert first.score == 1.0
    assert hung.score is None
    assert hung.outcome is Outcome.TIMED_OUT
    assert "took longer than 0.02 s" in hung.reason
    assert last.score == 1.0


def test_the_late_result_of_a_call_is_nobody_elses():
    """A call that ends after its time must not hand its value to a later sample."""
    release, finished = threading.Event(), threading.Event()

    def grader(completion: str, item: dict) -> float:
        if completion == "late":
            release.wait()
            finished.set()
            return -99.0
        release.set()
        finished.wait()
        return 1.0

    graded = FunctionGrader(grader, timeout_s=SHORT)
    assert graded([sample("late")])[0].outcome is Outcome.TIMED_OUT
    graded.call.timeout_s = LONG
    assert [g.score for g in graded([sample("go"), sample("go")])] == [1.0, 1.0]


def test_too_many_hanging_calls_stop_the_run(never):
    def grader(completion: str, item: dict) -> float:
        never.wait()
        return 1.0

    graded = FunctionGrader(grader, timeout_s=0.001)
    grades = graded([sample()] * MAX_ABANDONED)
    assert [grade.outcome for grade in grades] == [Outcome.TIMED_OUT] * MAX_ABANDONED
    with pytest.raises(GraderError, match=rf"{MAX_ABANDONED + 1} calls took longer .*timeout_s = 0\.001 "):
        graded([sample()])


def test_no_samples_start_no_thread():
    grader = FunctionGrader(returning(1), timeout_s=LONG)
    before = threading.active_count()
    assert grader([]) == []
    assert threading.active_count() == before
