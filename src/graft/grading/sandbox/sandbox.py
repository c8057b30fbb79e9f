"""A pool of warm parents, and what their calls mean."""

from __future__ import annotations

import json
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from graft.errors import ConfigError, DataError, GraderError
from graft.grading.sandbox.packages import packages_in
from graft.grading.sandbox.records import (
    AssertionTest,
    CodeTest,
    ProgramTest,
    SandboxLimits,
    SandboxResult,
)
from graft.grading.sandbox.verdict import grade_result, passed, tests_result
from graft.grading.sandbox.worker import Ended, Worker, WorkerLost

Given = TypeVar("Given")
Made = TypeVar("Made")

ATTEMPTS = 2
"""How often a call is tried when its worker is lost."""


class Sandbox:
    """Runs foreign Python: `python` graders and code tests.

    Every call gets a process, a process namespace, files and limits of its own, and the kernel clears them all away
    when it ends; `docs/sandbox.md` says what that does and does not prevent.
    """

    def __init__(self, *, workers: int, limits: SandboxLimits | None = None, unsafe: bool = False) -> None:
        """
        Args:
            workers: calls that run side by side.
            limits: what each call may use. Default: OpenAI's.
            unsafe: run without bubblewrap, as this user and with this user's files and network.

        Raises:
            ConfigError: no workers.
            GraderError: the sandbox cannot run on this machine; says why and what to do.
        """
        if workers < 1:
            raise ConfigError(f"sandbox: workers = {workers}; want at least 1")
        self.limits = limits or SandboxLimits()
        self.unsafe = unsafe
        self._closed = False
        self._lock = threading.Lock()
        self._alive: set[Worker] = set()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)  # started when needed
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="graft-sandbox")
        try:
            self._try_out()
        except BaseException:
            self.close()
            raise

    def run_grade(
        self, source: str, calls: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
    ) -> list[SandboxResult]:
        """Run a grader's `grade(sample, item)`, once for each call, each in a fresh process.

        Args:
            source: Python that defines `grade`.
            calls: sample and item of each call; JSON values.

        Returns:
            A result for each call, in their order.

        Raises:
            DataError: a call holds something that JSON cannot.
            GraderError: the sandbox is closed, or a lost worker could not be replaced.
        """
        packages = packages_in(source)

        def grade(call: tuple[Mapping[str, Any], Mapping[str, Any]]) -> SandboxResult:
            nonce = secrets.token_hex()
            sample, item = call
            done = self._call(
                {
                    "kind": "grade",
                    "source": source,
                    "sample": dict(sample),
                    "item": dict(item),
                    "nonce": nonce,
                },
                packages,
            )
            return grade_result(done, nonce, self.limits)

        return self._each(grade, calls)

    def run_tests(self, calls: Sequence[tuple[str, Sequence[CodeTest]]]) -> list[SandboxResult]:
        """Run code against tests, each test in a fresh process.

        Whatever the code does wrong, running out of a limit included, is a test that it fails.

        Args:
            calls: code and its tests, at least one.

        Returns:
            For each code the share of tests passed; `reason` names the failed ones, `stdout` is that of the first
            failed test.

        Raises:
            DataError: there are no tests.
            GraderError: the sandbox is closed, or a lost worker could not be replaced.
        """
        for place, (_, tests) in enumerate(calls):
            if not tests:
                raise DataError(
                    f"code tests, call {place}: no tests; want at least one ProgramTest or AssertionTest"
                )

        def test(job: tuple[str, CodeTest]) -> SandboxResult:
            code, one = job
            nonce = secrets.token_hex()
            asked = packages_in(code) | (packages_in(one.source) if isinstance(one, AssertionTest) else set())
            done = self._call(_test_call(code, one, nonce), asked)
            return passed(done, nonce, one, self.limits)

        results = iter(self._each(test, [(code, one) for code, tests in calls for one in tests]))
        return [tests_result([next(results) for _ in tests]) for _, tests in calls]

    def close(self) -> None:
        """End all workers and the calls that run in them."""
        with self._lock:
            self._closed = True
            alive, self._alive = self._alive, set()
        for worker in alive:
            worker.kill()
        self._threads.shutdown()
        for worker in alive:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _try_out(self) -> None:
        [trial] = self.run_grade("def grade(sample, item):\n    return 1.0\n", [({}, {})])
        if trial.value != 1.0:
            raise GraderError(
                f"the sandbox for foreign code does not work here: {trial.outcome}: {trial.reason}"
            )

    def _each(self, function: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
        """All calls over the pool, in order; none is left running when one raises."""
        if self._closed:
            raise GraderError("the sandbox is closed")
        futures = [self._threads.submit(function, one) for one in given]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _call(self, call: Mapping[str, Any], packages: frozenset[str]) -> Ended | WorkerLost:
        """One call on a free worker; a lost worker is replaced, and what lost the last one is returned."""
        try:
            payload = json.dumps(call).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"sandbox: sample and item must hold JSON values alone: {error}") from None
        lost = WorkerLost("not tried")
        for _ in range(ATTEMPTS):
            worker = self._idle.get()
            try:
                worker = worker or self._start()
                return worker.run(payload, packages)
            except WorkerLost as error:
                lost = error
                if worker is not None:
                    self._discard(worker)
                worker = None
            finally:
                self._idle.put(worker)
        return lost

    def _start(self) -> Worker:
        worker = Worker(self.limits, unsafe=self.unsafe)
        with self._lock:
            if not self._closed:
                self._alive.add(worker)
                return worker
        worker.close()
        raise GraderError("the sandbox is closed")

    def _discard(self, worker: Worker) -> None:
        with self._lock:
            ours = worker in self._alive
            self._alive.discard(worker)
        if not ours:  # `close` has it
            raise GraderError("the sandbox was closed while a call was running")
        worker.close()


def _test_call(code: str, test: CodeTest, nonce: str) -> dict[str, str]:
    match test:
        case ProgramTest():
            return {"kind": "program", "source": code, "stdin": test.stdin, "nonce": nonce}
        case AssertionTest():
            return {"kind": "assertions", "source": code, "test": test.source, "nonce": nonce}
