"""The `python` grader: `grade(sample, item)` in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from graft.errors import GraderError
from graft.grading.observe import Observation, Observer, with_faults
from graft.grading.sandbox.records import CodeTest
from graft.grading.schema import Python
from graft.types import Fault, Grade, Outcome, Sample

Call = tuple[dict[str, Any], dict[str, Any]]
"""`sample` and `item`."""


class SandboxResult(Protocol):
    """What came of one call."""

    @property
    def value(self) -> float | None: ...
    @property
    def outcome(self) -> Outcome: ...
    @property
    def reason(self) -> str: ...


class Sandbox(Protocol):
    """Runs sources that nobody has to trust."""

    def run_grade(self, source: str, calls: Sequence[Call]) -> Sequence[SandboxResult]: ...
    def run_tests(self, calls: Sequence[tuple[str, Sequence[CodeTest]]]) -> Sequence[SandboxResult]: ...


class PythonGrader:
    """Hands the calls of all samples to the sandbox at once."""

    def __init__(self, spec: Python, observe: Observer, sandbox: Sandbox) -> None:
        self._source, self._observe, self._sandbox = spec.source, observe, sandbox

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        """Grade each sample."""
        seen = [self._observe(sample) for sample in samples]
        try:
            results = self._sandbox.run_grade(self._source, [_call(one) for one in seen])
        except GraderError as error:  # the sandbox itself
            faults = {Fault.PYTHON_GRADER_SERVER: str(error)}
            lost = Grade(None, Outcome.CRASHED, reason=str(error), faults=faults)
            return [with_faults(lost, one.faults) for one in seen]
        return [with_faults(_grade(r), one.faults) for r, one in zip(results, seen, strict=True)]


def _call(seen: Observation) -> Call:
    return dict(seen.sample), dict(seen.item)


def _grade(result: SandboxResult) -> Grade:
    if result.outcome is Outcome.GRADED:
        return Grade(result.value, reason=result.reason)
    broken = result.outcome is Outcome.SANDBOX_FAILED
    fault = Fault.PYTHON_GRADER_SERVER if broken else Fault.PYTHON_GRADER_RUNTIME
    return Grade(None, result.outcome, reason=result.reason, faults={fault: result.reason})
