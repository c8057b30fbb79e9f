"""The `python` grader: `grade(sample, item)` in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graft.errors import GraderError
from graft.grading.observe import Observation, Observer, with_faults
from graft.grading.sandbox.records import SandboxResult
from graft.grading.schema import Python
from graft.types import Fault, Grade, Outcome, Sample

Call = tuple[dict[str, Any], dict[str, Any]]
"""`sample` and `item`."""


RunGrade = Callable[[str, Sequence[Call]], Sequence[SandboxResult]]
"""Runs a source's `grade` once for each call; `Sandbox.run_grade`."""


class PythonGrader:
    """Hands the calls of all samples to the sandbox at once."""

    def __init__(self, spec: Python, observe: Observer, run_grade: RunGrade) -> None:
        self._source, self._observe, self._run_grade = spec.source, observe, run_grade

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        """Grade each sample."""
        seen = [self._observe(sample) for sample in samples]
        try:
            results = self._run_grade(self._source, [_call(one) for one in seen])
        except GraderError as error:
            return without_sandbox(error, seen)
        return [with_faults(_grade(r), one.faults) for r, one in zip(results, seen, strict=True)]


def without_sandbox(error: GraderError, seen: Sequence[Observation]) -> list[Grade]:
    """The grades of samples that a broken sandbox could not be asked about."""
    faults = {Fault.PYTHON_GRADER_SERVER: str(error)}
    lost = Grade(None, Outcome.SANDBOX_FAILED, reason=str(error), faults=faults)
    return [with_faults(lost, one.faults) for one in seen]


def _call(seen: Observation) -> Call:
    return dict(seen.sample), dict(seen.item)


def _grade(result: SandboxResult) -> Grade:
    if result.outcome is Outcome.GRADED:
        return Grade(result.value, reason=result.reason)
    broken = result.outcome is Outcome.SANDBOX_FAILED
    fault = Fault.PYTHON_GRADER_SERVER if broken else Fault.PYTHON_GRADER_RUNTIME
    return Grade(None, result.outcome, reason=result.reason, faults={fault: result.reason})
