"""What all critics share: scales, failures, clocks, and what a critique must be."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from graft.critics.build import ask
from graft.critics.grader import GraderCritic
from graft.critics.scores import (
    checked,
    clipped,
    each_timed,
    failed,
    grade_each,
    overall_score,
    share_of_time,
    side_by_side,
    total_usage,
)
from graft.types import Chain, Critique, Grade, Outcome, Sample, TokenUsage
from tests.critics.chains import make_chain
from tests.grading.samples import sample

CHAIN = make_chain("a", "b")
GOOD = Critique(
    10.0, (10.0, 0.0), (2.0, 5.0), ("", "no"), calls=3, sampled_tokens=7, usage={"m": TokenUsage(1, 2)}
)


@pytest.mark.parametrize(
    ("grade", "overall"),
    [
        (None, None),
        (Grade(None, Outcome.CRASHED), None),
        (Grade(0.0), 0.0),
        (Grade(0.25), 2.5),
        (Grade(1.5), 15.0),
    ],
)
def test_the_overall_score(grade, overall):
    assert overall_score(grade, 10.0) == overall


@pytest.mark.parametrize(("score", "expected"), [(-0.5, 0.0), (0.0, 0.0), (0.3, 1.5), (1.0, 5.0), (7.0, 5.0)])
def test_a_clipped_score(score, expected):
    assert clipped(score, 5.0) == expected


def test_a_failure_has_no_scores_and_its_cost():
    critique = failed(Outcome.TIMED_OUT, "x" * 2000, calls=2, sampled_tokens=5)
    assert not critique.scored
    assert (critique.overall, critique.thoughts, critique.progress) == (None, (), ())
    assert (critique.calls, critique.sampled_tokens, critique.problem) == (2, 5, "x" * 1000)


def test_a_critique_that_fits_stays():
    assert checked(GOOD, CHAIN, 10.0) is GOOD
    assert checked(replace(GOOD, reasons=()), CHAIN, 10.0) == replace(GOOD, reasons=("", ""))
    bad = failed(Outcome.TIMED_OUT, "late")
    assert checked(bad, CHAIN, 10.0) is bad
    assert checked(replace(GOOD, overall=None), CHAIN, 10.0).scored  # a chain that still grows
    assert checked(replace(GOOD, overall=25.0), CHAIN, 10.0).scored  # a grade above 1


@pytest.mark.parametrize(
    ("change", "outcome", "words"),
    [
        ({"thoughts": (1.0,)}, Outcome.CRASHED, "1 entries in 'thoughts' for a chain of 2 thoughts"),
        ({"progress": (1.0, 2.0, 3.0)}, Outcome.CRASHED, "3 entries in 'progress' for a chain of 2 thoughts"),
        ({"reasons": ("why",)}, Outcome.CRASHED, "1 entries in 'reasons' for a chain of 2 thoughts"),
        ({"thoughts": (1.0, math.nan)}, Outcome.NOT_FINITE, "must be finite"),
        ({"overall": math.inf}, Outcome.NOT_FINITE, "must be finite"),
        ({"thoughts": (1.0, 10.1)}, Outcome.CRASHED, "want 0 to 10"),
        ({"progress": (-0.1, 1.0)}, Outcome.CRASHED, "want 0 to 10"),
    ],
)
def test_a_critique_that_does_not_fit_is_a_failure_with_the_same_cost(change, outcome, words):
    found = checked(replace(GOOD, **change), CHAIN, 10.0)
    assert found.outcome is outcome
    assert words in found.problem
    assert (found.overall, found.thoughts, found.progress) == (None, (), ())
    assert (found.calls, found.sampled_tokens, found.usage) == (3, 7, {"m": TokenUsage(1, 2)})


def test_an_equal_share_of_the_time():
    critiques = share_of_time([GOOD, GOOD, GOOD], began=-math.inf)
    assert [critique.seconds for critique in critiques] == [math.inf] * 3
    assert share_of_time([], began=0.0) == []


def test_usage_adds_up_by_model():
    grades = [
        Grade(1.0, usage={"a": TokenUsage(1, 2, 3), "b": TokenUsage(5, 0, 0)}),
        Grade(0.0),
        Grade(0.0, usage={"a": TokenUsage(10, 20, 30)}),
    ]
    assert total_usage(grades) == {"a": TokenUsage(11, 22, 33), "b": TokenUsage(5, 0, 0)}


@pytest.mark.parametrize("calls_at_once", [1, 3])
def test_chains_are_judged_in_order(calls_at_once):
    """Side by side, each waits until all have begun: only so many threads bring it to an end."""
    chains = [make_chain(text) for text in ("one", "two", "three")]
    begun = threading.Barrier(calls_at_once)

    def judge(chain: Chain) -> Critique:
        begun.wait(timeout=60)
        return Critique(reasons=chain.thoughts)

    critiques = each_timed(judge, chains, calls_at_once=calls_at_once)
    assert [critique.reasons for critique in critiques] == [("one",), ("two",), ("three",)]
    assert all(critique.seconds >= 0 for critique in critiques)


class StoppedError(Exception):
    """The user's wish."""


@pytest.mark.parametrize("calls_at_once", [1, 2])
def test_a_wait_can_be_left_and_then_nothing_more_is_asked(calls_at_once):
    """The threads hang until the test lets them go: what is left by then is never asked about."""
    go_on, asked = threading.Event(), []
    begun = threading.Semaphore(0)

    def ask(item: int) -> int:
        asked.append(item)
        begun.release()
        go_on.wait(timeout=60)
        return item

    def waiting() -> None:
        for _ in range(calls_at_once):
            assert begun.acquire(timeout=60)
        raise StoppedError

    with pytest.raises(StoppedError):
        side_by_side(ask, range(6), calls_at_once=calls_at_once, waiting=waiting)
    go_on.set()
    for thread in [own for own in threading.enumerate() if own.name == "graft-critic"]:
        thread.join(timeout=60)
    assert sorted(asked) == list(range(calls_at_once))


def test_what_goes_wrong_with_one_is_raised():
    def ask(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        side_by_side(ask, [1, 0, 1], calls_at_once=2)


def test_critics_that_wait_for_servers_can_be_stopped():
    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        ask(GraderCritic(LengthGrader(1), scale=10), [make_chain("a")], stop)
    assert len(ask(GraderCritic(LengthGrader(1), scale=10), [make_chain("a")], lambda: None)) == 1


class LengthGrader:
    """The length of the text; remembers how many it was asked about at once."""

    def __init__(self, calls_at_once: int) -> None:
        self.calls_at_once = calls_at_once
        self.asked: list[int] = []

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        self.asked.append(len(samples))
        return [Grade(float(len(each.text))) for each in samples]


@pytest.mark.parametrize(("calls_at_once", "asked"), [(1, [3]), (2, [1, 1, 1])])
def test_grades_in_the_order_of_the_samples(calls_at_once, asked):
    grader = LengthGrader(calls_at_once)
    grades = grade_each(grader, [sample("a"), sample("bb"), sample("")])
    assert [grade.score for grade in grades] == [1.0, 2.0, 0.0]
    assert grader.asked == asked
