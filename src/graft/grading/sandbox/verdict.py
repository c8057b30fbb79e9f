"""What an ended call means."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from graft.data.sources import printable
from graft.grading.sandbox.inside.run import READY
from graft.grading.sandbox.records import CodeTest, ProgramTest, SandboxLimits, SandboxResult
from graft.grading.sandbox.worker import Ended, WorkerLost
from graft.types import Outcome

SHOWN_TESTS = 3
"""Failed tests of which a result tells the reason."""

SHOWN_CHARACTERS = 200
"""Of a wrong output."""


def grade_result(ended: Ended | WorkerLost, nonce: str, limits: SandboxLimits) -> SandboxResult:
    """The result of a call of `grade`."""
    failure = _failure(ended, nonce, limits)
    if failure is not None:
        return failure
    assert isinstance(ended, Ended)
    value = (_record(ended, nonce) or {}).get("value")
    if not isinstance(value, float):
        return _result(ended, Outcome.CRASHED, "the code wrote to the sandbox's own result pipe")
    if not math.isfinite(value):
        return _result(ended, Outcome.NOT_FINITE, f"grade returned {value}; a score must be finite")
    return replace(_result(ended, Outcome.GRADED, ""), value=value)


def passed(ended: Ended | WorkerLost, nonce: str, test: CodeTest, limits: SandboxLimits) -> SandboxResult:
    """The result of one test: 1 if the code passes, 0 if it fails in whatever way, None if it could not be tried."""
    failure = _failure(ended, nonce, limits)
    if (
        isinstance(test, ProgramTest)
        and isinstance(ended, Ended)
        and ended.status == 0
        and ended.over is None
    ):
        if _lines(_text(ended.output)) == _lines(test.stdout):
            return replace(_result(ended, Outcome.GRADED, ""), value=1.0)
        shown = _text(ended.output)[:SHOWN_CHARACTERS]
        return replace(
            _result(ended, Outcome.GRADED, f"wrote {shown!r}, which is not what is wanted"), value=0.0
        )
    if failure is None:
        assert isinstance(ended, Ended)
        return replace(_result(ended, Outcome.GRADED, ""), value=1.0)
    return failure if failure.outcome is Outcome.SANDBOX_FAILED else replace(failure, value=0.0)


def tests_result(results: Sequence[SandboxResult]) -> SandboxResult:
    """The share of tests that were passed; none where one could not be tried."""
    seconds = sum(result.seconds for result in results)
    broken = [result for result in results if result.value is None]
    if broken:
        return replace(broken[0], seconds=seconds)
    failed = [(number, result) for number, result in enumerate(results, 1) if result.value == 0.0]
    reasons = [f"test {number}: {result.reason}" for number, result in failed[:SHOWN_TESTS]]
    if failed:
        reasons.insert(0, f"{len(failed)} of {len(results)} tests failed")
    return SandboxResult(
        value=(len(results) - len(failed)) / len(results),
        outcome=Outcome.GRADED,
        reason="\n".join(reasons),
        stdout=failed[0][1].stdout if failed else "",
        seconds=seconds,
    )


def _failure(ended: Ended | WorkerLost, nonce: str, limits: SandboxLimits) -> SandboxResult | None:
    """Why the call did not come to its end; None if it did."""
    if isinstance(ended, WorkerLost):
        reason = f"the sandbox's worker was lost: {ended}"
        return SandboxResult(None, Outcome.SANDBOX_FAILED, reason, stdout="", seconds=0.0)
    match ended.over:
        case "wall_s":
            return _result(ended, Outcome.TIMED_OUT, f"took longer than wall_s = {limits.wall_s:g} s")
        case "memory_mb":
            return _result(ended, Outcome.OVER_LIMIT, f"used more than memory_mb = {limits.memory_mb} MiB")
        case "output_kb":
            return _result(ended, Outcome.OVER_LIMIT, f"wrote more than output_kb = {limits.output_kb} KiB")
        case "record":
            return _result(ended, Outcome.CRASHED, "the code wrote to the sandbox's own result pipe")
        case None:
            pass
    if not ended.record.startswith(READY):
        return _result(ended, Outcome.SANDBOX_FAILED, _text(ended.output) or _ending(ended.status))
    record = _record(ended, nonce)
    if record is not None and "error" in record:
        outcome = Outcome.OVER_LIMIT if record["error"] == "memory" else Outcome.CRASHED
        return _result(ended, outcome, printable(str(record.get("reason", ""))))
    if record is not None:
        return None
    if ended.status == -signal.SIGKILL and ended.cpu_s >= limits.cpu_s - 1:
        return _result(ended, Outcome.TIMED_OUT, f"used more processor time than cpu_s = {limits.cpu_s} s")
    if len(ended.record) > len(READY):
        return _result(ended, Outcome.CRASHED, "the code wrote to the sandbox's own result pipe")
    return _result(ended, Outcome.CRASHED, f"the code ended its process: {_ending(ended.status)}")


def _record(ended: Ended, nonce: str) -> dict[str, Any] | None:
    """The record if it is whole and has the call's nonce. Foreign code may have written anything there."""
    try:
        record = json.loads(ended.record.removeprefix(READY))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("nonce") == nonce else None


def _result(ended: Ended, outcome: Outcome, reason: str) -> SandboxResult:
    return SandboxResult(None, outcome, reason, stdout=_text(ended.output), seconds=ended.seconds)


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
