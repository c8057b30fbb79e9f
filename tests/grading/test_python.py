"""The python grader over a sandbox that is a stand-in: what goes in, and what comes of each outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from graft.errors import GraderError
from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.observe import Observer
from graft.types import Fault, Grade, Outcome
from tests.grading.samples import sample

SOURCE = "def grade(sample, item):\n    return 1.0\n"


@dataclass(frozen=True)
class Result:
    value: float | None
    outcome: Outcome = Outcome.GRADED
    reason: str = ""
    stdout: str = ""
    seconds: float = 0.0


class Stand:
    """Records the calls, and answers them in order."""

    def __init__(self, *results: Result | Exception) -> None:
        self.results = results
        self.calls: list[tuple[str, list[Any]]] = []

    def run_grade(self, source: str, calls: Sequence[Any]) -> list[Result]:
        self.calls.append((source, list(calls)))
        for result in self.results:
            if isinstance(result, Exception):
                raise result
        return list(self.results)  # pyright: ignore[reportReturnType]

    def run_tests(self, calls: Sequence[Any]) -> list[Result]:
        raise NotImplementedError


def build(stand: Stand, **options: Any):
    spec = parse_grader({"type": "python", "source": SOURCE})
    return build_grader(spec, Services(sandbox=stand, sandbox_workers=3), Observer(), **options)


def test_all_samples_go_in_at_once_sample_first():
    stand = Stand(Result(0.5), Result(-2.0))
    grader = build(stand)
    assert grader([sample("a", answer="4"), sample("b", answer="5")]) == [Grade(0.5), Grade(-2.0)]
    [(source, calls)] = stand.calls
    assert source == SOURCE
    assert [(s["output_text"], item) for s, item in calls] == [("a", {"answer": "4"}), ("b", {"answer": "5"})]
    assert set(calls[0][0]) == {"output_text", "output_json", "output_tools", "output_audio", "choices"}
    assert grader.calls_at_once == 3


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.CRASHED, Outcome.NOT_FINITE])
def test_a_call_that_fails_is_a_runtime_error_with_its_traceback(outcome):
    [grade] = build(Stand(Result(None, outcome, "Traceback: KeyError")))([sample()])
    assert (grade.score, grade.outcome) == (None, outcome)
    assert grade.faults == {Fault.PYTHON_GRADER_RUNTIME: "Traceback: KeyError"}


def test_a_sandbox_that_fails_is_a_server_error_of_every_sample():
    grades = build(Stand(GraderError("no more workers")))([sample(), sample()])
    assert [g.faults for g in grades] == [{Fault.PYTHON_GRADER_SERVER: "no more workers"}] * 2
    assert all(g.score is None for g in grades)


def test_without_a_sandbox_it_is_refused_when_built():
    with pytest.raises(GraderError, match="python graders need the sandbox"):
        build_grader(parse_grader({"type": "python", "source": SOURCE}), Services(), Observer())
