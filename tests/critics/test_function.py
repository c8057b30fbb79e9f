"""A function of one's own, and any grader, as critics."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.critics.function import FunctionCritic
from graft.critics.grader import GraderCritic
from graft.types import Chain, Critique, Grade, Outcome, Sample, StopReason, TokenUsage
from tests.critics.chains import make_chain

CHAIN = make_chain("one", "two", score=0.5)


def critique_of(value: Any, chain: Chain = CHAIN, timeout_s: float = 20.0) -> Critique:
    def function(given: Chain) -> Any:
        assert given is chain
        return value() if callable(value) else value

    [critique] = FunctionCritic(function, scale=10, timeout_s=timeout_s)([chain])
    return critique


def test_a_mapping():
    critique = critique_of({"thoughts": [1, 2], "progress": (3, 10)})
    assert critique.outcome is Outcome.GRADED
    assert (critique.overall, critique.thoughts, critique.progress) == (5, (1, 2), (3, 10))
    assert critique.reasons == ("", "")
    assert critique.calls == 1


def test_everything_it_may_say():
    critique = critique_of({"thoughts": [1, 2], "progress": [3, 4], "overall": 7, "reasons": ["a", "b"]})
    assert (critique.overall, critique.reasons) == (7, ("a", "b"))


def test_a_critique_of_its_own():
    own = Critique(1.0, (1, 2), (3, 4), ("a", "b"), calls=3, sampled_tokens=9)
    critique = critique_of(own)
    assert (critique.calls, critique.sampled_tokens, critique.overall) == (3, 9, 1.0)
    failure = critique_of(Critique(outcome=Outcome.TIMED_OUT, problem="too slow"))
    assert failure.outcome is Outcome.TIMED_OUT
    assert "too slow" in failure.problem


def fail() -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("value", "outcome", "words"),
    [
        (fail, Outcome.CRASHED, "raised RuntimeError: broken (" + __file__),
        (None, Outcome.CRASHED, "want a Critique, or a mapping"),
        ({"thoughts": [1, 2]}, Outcome.CRASHED, "want a Critique, or a mapping"),
        (
            {"thoughts": [1, 2], "progress": [1, 2], "total": 3},
            Outcome.CRASHED,
            "want a Critique, or a mapping",
        ),
        (
            {"thoughts": [1], "progress": [1, 2]},
            Outcome.CRASHED,
            "1 entries in 'thoughts' for a chain of 2 thoughts",
        ),
        (
            {"thoughts": [1, 2], "progress": [1, 2], "reasons": ["a"]},
            Outcome.CRASHED,
            "1 entries in 'reasons'",
        ),
        ({"thoughts": [1, "x"], "progress": [1, 2]}, Outcome.CRASHED, "could not convert"),
        ({"thoughts": [1, 11], "progress": [1, 2]}, Outcome.CRASHED, "want 0 to 10"),
        ({"thoughts": [1, -0.1], "progress": [1, 2]}, Outcome.CRASHED, "want 0 to 10"),
        ({"thoughts": [1, float("nan")], "progress": [1, 2]}, Outcome.NOT_FINITE, "finite"),
        ({"thoughts": [1, 2], "progress": [1, float("inf")]}, Outcome.NOT_FINITE, "finite"),
        ({"thoughts": [1, 2], "progress": [1, 2], "overall": float("nan")}, Outcome.NOT_FINITE, "finite"),
    ],
)
def test_nonsense_is_an_outcome(value, outcome, words):
    critique = critique_of(value)
    assert critique.outcome is outcome
    assert words in critique.problem
    assert (critique.overall, critique.thoughts, critique.progress, critique.calls) == (None, (), (), 1)


def test_a_function_that_hangs():
    never = threading.Event()
    try:
        critique = critique_of(never.wait, timeout_s=0.02)
    finally:
        never.set()
    assert critique.outcome is Outcome.TIMED_OUT
    assert "took longer than 0.02 s" in critique.problem


def test_the_example_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "critics.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], namespace)
    [critique] = FunctionCritic(namespace["critic"], scale=10, timeout_s=20)([make_chain("a", "b" * 200)])
    assert (critique.thoughts, critique.progress) == ((10, 5), (5, 10))


class LengthGrader:
    """Scores a text by its length in tenths; remembers what it saw."""

    def __init__(self, calls_at_once: int = 1, bad: str = "") -> None:
        self.seen: list[Sample] = []
        self.calls_at_once, self._bad = calls_at_once, bad

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        self.seen += samples
        return [
            Grade(None, Outcome.TIMED_OUT, reason="slow")
            if self._bad and self._bad in sample.text
            else Grade(len(sample.text) / 10, reason=sample.text, usage={"m": TokenUsage(1, 1)})
            for sample in samples
        ]


@pytest.mark.parametrize("calls_at_once", [1, 4])
def test_a_grader_judges_thoughts_and_what_stands_so_far(calls_at_once):
    grader = LengthGrader(calls_at_once)
    chains = [
        make_chain("one", "three", "eleven long", score=0.5),
        make_chain(),
        make_chain("ab", score=None),
    ]
    first, second, third = GraderCritic(grader, scale=10)(chains)
    assert first.thoughts == (3, 5, 10)  # longer than ten letters: clipped
    assert first.progress == (3, 8, 10)
    assert first.reasons == ("one", "three", "eleven long")
    assert (first.overall, first.calls, first.usage) == (5, 6, {"m": TokenUsage(6, 6)})
    assert (second.thoughts, second.calls) == ((), 0)
    assert (third.overall, third.thoughts, third.progress) == (None, (2,), (2,))
    assert {sample.stop for sample in grader.seen} == {StopReason.CUT}
    by_text = {sample.text: sample.tokens for sample in grader.seen}
    assert (by_text["three"], by_text["onethree"]) == (5, 8)


def test_a_grade_that_failed_spoils_its_own_critique_alone():
    first, second = GraderCritic(LengthGrader(bad="two"), scale=10)([CHAIN, make_chain("one")])
    assert first.outcome is Outcome.TIMED_OUT
    assert first.problem == "slow"
    assert first.thoughts == ()
    assert second.thoughts == (3,)
