"""The `code_tests` grader: the completion's code against the row's tests, in the sandbox."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graft.errors import DataError, GraderError
from graft.grading.observe import Observation, Observer, missing_grade, with_faults
from graft.grading.python import without_sandbox
from graft.grading.sandbox import AssertionTest, CodeTest, ProgramTest, SandboxResult
from graft.grading.schema import CodeTests
from graft.grading.template import MissingVariableError, parse_template
from graft.types import Fault, Grade, Sample

RunTests = Callable[[Sequence[tuple[str, Sequence[CodeTest]]]], Sequence[SandboxResult]]
"""Runs each code against its tests; `Sandbox.run_tests`."""

_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "py", "python", "python3")


def code_in(text: str) -> str:
    """The last fenced block of Python, also one that is not closed; all of the text if there is no fence."""
    blocks = [block[2] for block in _BLOCK.finditer(text) if block[1].lower() in _PYTHON]
    return blocks[-1] if blocks else text


def read_tests(value: Any) -> list[CodeTest]:
    """A row's tests.

    Args:
        value: a list of sources that raise when the code is wrong (`assert double(2) == 4`), and of
            `{"stdin": ..., "stdout": ...}` for programs.

    Raises:
        ValueError: it is something else; says what.
    """
    if not isinstance(value, list) or not value:
        raise ValueError("want a list of tests, at least one")
    return [_read_test(place, test) for place, test in enumerate(value)]


def _read_test(place: int, test: Any) -> CodeTest:
    if isinstance(test, str) and test.strip():
        return AssertionTest(test)
    if isinstance(test, Mapping) and set(test) == {"stdin", "stdout"}:
        stdin, stdout = test["stdin"], test["stdout"]
        if isinstance(stdin, str) and isinstance(stdout, str):
            return ProgramTest(stdin, stdout)
    raise ValueError(
        f'test {place}: want a source such as "assert double(2) == 4", or {{"stdin": text, "stdout": text}}'
    )


class CodeTestsGrader:
    """Hands the code of all samples to the sandbox at once."""

    def __init__(self, spec: CodeTests, observe: Observer, run_tests: RunTests) -> None:
        self._spec, self._observe, self._run_tests = spec, observe, run_tests
        self._text = parse_template(spec.input)

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        """Grade each sample: the share of tests passed, or whether all are.

        Raises:
            DataError: a row has no tests.
        """
        seen = [self._observe(sample) for sample in samples]
        codes = [self._code(one) for one in seen]
        tests = [self._tests(sample) for sample in samples]
        calls = [(code, its) for code, its in zip(codes, tests, strict=True) if isinstance(code, str)]
        try:
            results = iter(self._run_tests(calls))
        except GraderError as error:
            return without_sandbox(error, seen)
        grades = [code if isinstance(code, Grade) else self._grade(next(results)) for code in codes]
        return [with_faults(grade, one.faults) for grade, one in zip(grades, seen, strict=True)]

    def _code(self, seen: Observation) -> str | Grade:
        """The code, or the grade of a sample that has none."""
        try:
            return code_in(self._text.render(seen.namespaces))
        except MissingVariableError as missing:
            return missing_grade(seen, missing)

    def _tests(self, sample: Sample) -> list[CodeTest]:
        key, item = self._spec.key, sample.prompt.item
        try:
            return read_tests(item.get(key))
        except ValueError as error:
            raise DataError(f"grader 'code_tests', row {sample.prompt.row}: item.{key}: {error}") from None

    def _grade(self, result: SandboxResult) -> Grade:
        if result.value is None:
            faults = {Fault.PYTHON_GRADER_SERVER: result.reason}
            return Grade(None, result.outcome, reason=result.reason, faults=faults)
        score = float(result.value == 1) if self._spec.every else result.value
        return Grade(score, reason=result.reason)
