"""The `endpoint` grader: one's own HTTP service is sent sample and row, and answers `{"score": number}`.

OpenAI's private beta: 1 MB, 10 minutes and 3 further attempts; then the sample has no score.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from graft.data.sources import shown
from graft.grading.deadline import within
from graft.grading.libraries import import_library
from graft.grading.observe import Observation
from graft.grading.pace import Pace
from graft.grading.schema import Endpoint
from graft.types import Fault, Grade, Outcome

LARGEST_ANSWER = 1_000_000
"""Bytes."""

TIMEOUT_S = 600.0
RETRIES = 3
FIRST_PAUSE_S = 0.5
"""Before the second attempt; doubles each time."""


class EndpointGrader:
    """Asks a service for each sample. Safe to use from many threads."""

    def __init__(
        self,
        spec: Endpoint,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = RETRIES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            spec: url, headers and requests a second.
            timeout_s: longest time of one attempt.
            retries: further attempts after no connection, 408, 429 or 5xx.
            sleep: waits for so many seconds.

        Raises:
            GraderError: the httpx2 library is missing.
        """
        self._http = import_library("httpx2", "endpoint graders")
        self._spec, self._timeout_s, self._retries, self._sleep = spec, timeout_s, retries, sleep
        self._pace = Pace(spec.rate_limit)
        self._client = self._http.Client(timeout=timeout_s, headers=spec.headers or {})

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __call__(self, seen: Observation) -> Grade:
        """The service's score."""
        body = json.dumps(
            {"sample": seen.sample, "item": dict(seen.item), "trace_id": f"trace_{uuid.uuid4().hex}"}
        )
        grade = self._attempt(body)
        for attempt in range(self._retries):
            if isinstance(grade, Grade):
                return grade
            self._sleep(FIRST_PAUSE_S * 2**attempt)
            grade = self._attempt(body)
        return grade if isinstance(grade, Grade) else self._failed(*grade)

    def _attempt(self, body: str) -> Grade | tuple[Outcome, str]:
        """A grade, or why another attempt may help."""
        self._pace.wait()
        try:
            return within(self._timeout_s, lambda: self._exchange(body))
        except TimeoutError:
            return Outcome.TIMED_OUT, f"no whole answer in {self._timeout_s:g} s"

    def _exchange(self, body: str) -> Grade | tuple[Outcome, str]:
        try:
            with self._client.stream(
                "POST", self._spec.url, content=body, headers={"content-type": "application/json"}
            ) as reply:
                answer = bytearray()
                for chunk in reply.iter_bytes():
                    answer += chunk
                    if len(answer) > LARGEST_ANSWER:
                        return self._failed(Outcome.CRASHED, f"more than {LARGEST_ANSWER} bytes")
        except self._http.TimeoutException as error:
            return Outcome.TIMED_OUT, f"no answer in {self._timeout_s:g} s ({type(error).__name__})"
        except (self._http.HTTPError, self._http.InvalidURL) as error:
            return Outcome.CRASHED, f"{type(error).__name__}: {error}"
        if reply.status_code in (408, 429) or reply.status_code >= 500:
            return Outcome.CRASHED, f"status {reply.status_code}"
        if not reply.is_success:
            return self._failed(Outcome.CRASHED, f"status {reply.status_code}: {bytes(answer[:200])!r}")
        return self._read(bytes(answer))

    def _read(self, answer: bytes) -> Grade:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return self._failed(Outcome.CRASHED, f"no JSON: {answer[:200]!r}")
        score: Any = value.get("score") if isinstance(value, dict) else None
        if not isinstance(score, int | float) or isinstance(score, bool):
            return self._failed(Outcome.CRASHED, f'got {shown(value)}; want {{"score": number}}')
        try:
            score = float(score)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            return self._failed(Outcome.NOT_FINITE, f"the score is {score}")
        return Grade(score)

    def _failed(self, outcome: Outcome, details: str) -> Grade:
        details = f"{self._spec.url}: {details}"
        return Grade(None, outcome, reason=details, faults={Fault.OTHER: details})
