"""Anybody's Python function as a grader: it may raise, return nonsense or hang without harming the run."""

from __future__ import annotations

import inspect
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from graft.errors import GraderError
from graft.types import Grade, Outcome, Sample

MAX_ABANDONED = 8
"""Calls that may hang for good before the run stops: each keeps a thread."""


class TimedFunction:
    """Anybody's function on a thread of its own: called one call after the other, none for longer than a limit."""

    def __init__(self, function: Callable[..., Any], *, timeout_s: float, what: str) -> None:
        """
        Args:
            function: what is called.
            timeout_s: longest time for one call, seconds.
            what: `grader` or `critic`, whose setting the limit is.
        """
        self.function = function
        self.timeout_s = timeout_s
        self.name = getattr(function, "__qualname__", repr(function))
        self._what = what
        self._worker: _Worker | None = None
        self._abandoned = 0
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """The function's value, or the exception that it raised.

        Raises:
            TimeoutError: this call took too long.
            GraderError: more than `MAX_ABANDONED` calls hang.
        """
        with self._lock:
            if self._worker is None:
                self._worker = _Worker()
            try:
                return self._worker.call(self.function, arguments, self.timeout_s)
            except queue.Empty:
                self._abandon()
        raise TimeoutError(f"{self.name} took longer than {self.timeout_s:g} s")

    def _abandon(self) -> None:
        """A thread cannot be killed; leave it behind and count it."""
        self._worker = None
        self._abandoned += 1
        if self._abandoned > MAX_ABANDONED:
            raise GraderError(
                f"{self._what} '{self.name}': {self._abandoned} calls took longer than {self._what}.timeout_s = "
                f"{self.timeout_s:g} and still run. Mend the function, or raise the limit if it is merely slow."
            )


class FunctionGrader:
    """Calls `function(completion, item)` or `function(completion, item, sample)` for each sample, one after the other.

    A third parameter with a default is the function's own affair, unless it is called `sample`.
    """

    def __init__(self, function: Callable[..., Any], *, timeout_s: float) -> None:
        """
        Args:
            function: returns a number, a bool, or a `Grade`.
            timeout_s: longest time for one call, seconds.

        Raises:
            GraderError: the function does not take two or three positional arguments.
        """
        self.call = TimedFunction(function, timeout_s=timeout_s, what="grader")
        self._takes_sample = _takes_sample(function, self.call.name)

    def __call__(self, samples: Sequence[Sample]) -> list[Grade]:
        """Grade each sample; a call that raises, hangs or returns no finite number gives an outcome, not a score.

        Raises:
            GraderError: more than `MAX_ABANDONED` calls hang.
        """
        return [self._grade(sample) for sample in samples]

    def _grade(self, sample: Sample) -> Grade:
        name = self.call.name
        try:
            value = self.call(
                sample.text, dict(sample.prompt.item), *((sample,) if self._takes_sample else ())
            )
        except TimeoutError as error:
            return Grade(None, Outcome.TIMED_OUT, reason=str(error))
        if isinstance(value, BaseException):
            return Grade(None, Outcome.CRASHED, reason=f"{name} raised {type(value).__name__}: {value}")
        return _as_grade(value, name)


class _Worker:
    """One daemon thread that calls functions one after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="graft-grader").start()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """The function's value, or the exception it raised. Raises queue.Empty when it takes too long."""
        self._calls.put((function, arguments))
        return self._results.get(timeout=timeout_s)

    def _run(self) -> None:
        while True:
            function, arguments = self._calls.get()
            try:
                self._results.put(function(*arguments))
            except BaseException as error:
                self._results.put(error)


def _takes_sample(function: Callable[..., Any], name: str) -> bool:
    """Whether the third positional parameter is for the sample: it has no default, or is called so."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    if not _can_take(signature, 2) and not _can_take(signature, 3):
        raise GraderError(
            f"grader '{name}{signature}': want function(completion, item) or function(completion, item, sample)"
        )
    positional = [
        p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) > 2:
        return positional[2].default is inspect.Parameter.empty or positional[2].name == "sample"
    return _can_take(signature, 3)


def _can_take(signature: inspect.Signature, count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _as_grade(value: Any, name: str) -> Grade:
    if isinstance(value, Grade) and value.score is None:
        return value
    number: Any = value.score if isinstance(value, Grade) else value
    try:
        score = float(number)
    except Exception:  # anybody's object: a tensor of two numbers, an integer too large
        return Grade(None, Outcome.CRASHED, reason=f"{name} returned {value!r}; want a number")
    if not math.isfinite(score):
        return Grade(None, Outcome.NOT_FINITE, reason=f"{name} returned {score}; a score must be finite")
    return replace(value, score=score) if isinstance(value, Grade) else Grade(score)
