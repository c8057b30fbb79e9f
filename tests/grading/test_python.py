"""The python grader over a sandbox that is a stand-in: what goes in, and what comes of each outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from graft.errors import GraderError
from graft.grading.build import Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.observe import Observer
from graft.grading.python import RunGrade
from graft.grading.sandbox import SandboxResult
from graft.types import Fault, Grade, Outcome
from tests.grading.samples import sample, sandbox_result

SOURCE = "def grade(sample, item):\n    return 1.0\n"


class Stand:
    """Stands in for the sandbox: records the calls, and answers them in order."""

    def __init__(self, *results: SandboxResult) -> None:
        self.results = results
        self.calls: list[tuple[str, list[Any]]] = []

    def run_grade(self, source: str, calls: Sequence[Any]) -> Sequence[SandboxResult]:
        self.calls.append((source, list(calls)))
        return self.results


def build(run_grade: RunGrade):
    spec = parse_grader({"type": "python", "source": SOURCE})
    return build_grader(spec, Services(run_grade=run_grade, sandbox_workers=3), Observer())


def test_all_samples_go_in_at_once_sample_first():
    stand = Stand(sandbox_result(0.5), sandbox_result(-2.0))
    grader = build(stand.run_grade)
    assert grader([sample("a", answer="4"), sample("b", answer="5")]) == [Grade(0.5), Grade(-2.0)]
    [(source, calls)] = stand.calls
    assert source == SOURCE
    assert [(s["output_text"], item) for s, item in calls] == [("a", {"answer": "4"}), ("b", {"answer": "5"})]
    assert set(calls[0][0]) == {"output_text", "output_json", "output_tools", "output_audio", "choices"}
    assert grader.calls_at_once == 3


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.CRASHED, Outcome.NOT_FINITE])
def test_a_call_that_fails_is_a_runtime_error_with_its_traceback(outcome):
    [grade] = build(Stand(sandbox_result(None, outcome, "Traceback: KeyError")).run_grade)([sample()])
    assert (grade.score, grade.outcome) == (None, outcome)
    assert grade.faults == {Fault.PYTHON_GRADER_RUNTIME: "Traceback: KeyError"}


def test_a_sandbox_that_fails_is_a_server_error_of_every_sample():
    def run_grade(source: str, calls: Sequence[Any]) -> list[SandboxResult]:
        raise GraderError("no more workers")

    grades = build(run_grade)([sample(), sample()])
    assert [g.faults for g in grades] == [{Fault.PYTHON_GRADER_SERVER: "no more workers"}] * 2
    assert all((g.score, g.outcome) == (None, Outcome.SANDBOX_FAILED) for g in grades)


def test_without_a_sandbox_it_is_refused_when_built():
    with pytest.raises(GraderError, match="python graders need the sandbox"):
        build_grader(parse_grader({"type": "python", "source": SOURCE}), Services(), Observer())
