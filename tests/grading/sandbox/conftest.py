"""A sandbox of one worker, kept for a module: what one test does in it must not matter to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from graft.grading.sandbox import Sandbox, SandboxResult
from tests.grading.sandbox.sandboxes import grader, open_sandbox

RunGrade = Callable[..., SandboxResult]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with open_sandbox() as opened:
        yield opened


@pytest.fixture
def grade(sandbox: Sandbox) -> RunGrade:
    """`grade(body, sample, item)` runs one call."""

    def run(body: str, sample: Any = None, item: Any = None) -> SandboxResult:
        [result] = sandbox.run_grade(grader(body), [(sample or {}, item or {})])
        return result

    return run
