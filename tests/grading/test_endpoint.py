"""The endpoint grader against a real server on loopback that behaves as servers do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from graft.grading.endpoint import LARGEST_ANSWER, EndpointGrader
from graft.grading.observe import Observer
from graft.grading.schema import Endpoint
from graft.types import Fault, Grade, Outcome
from tests.grading.samples import Reply, sample


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def ask(server, pauses) -> Iterator[Any]:
    opened: list[EndpointGrader] = []

    def ask(text: str = "four", *, headers: dict[str, str] | None = None, **options: Any) -> Grade:
        spec = Endpoint(type="endpoint", name="far", url=f"{server.url}/grade", headers=headers)
        grader = EndpointGrader(spec, sleep=pauses.append, **options)
        opened.append(grader)
        return grader(Observer()(sample(text, answer="4", messages=[{"role": "user", "content": "2+2?"}])))

    yield ask
    for grader in opened:
        grader.close()


def test_what_the_service_is_sent(server, ask):
    server.replies = [Reply(body={"score": 0.5})]
    assert ask(headers={"authorization": "Bearer x"}) == Grade(0.5)
    [request] = server.requests
    assert request.path == "/grade"
    assert request.headers["authorization"] == "Bearer x"
    assert request.headers["content-type"] == "application/json"
    assert set(request.body) == {"sample", "item", "trace_id"}
    assert request.body["item"] == {"answer": "4", "messages": [{"role": "user", "content": "2+2?"}]}
    assert request.body["sample"]["output_text"] == "four"
    assert request.body["sample"]["choices"][0]["message"]["content"] == "four"
    assert request.body["trace_id"].startswith("trace_")


@pytest.mark.parametrize("score", [0, 1, -3.5, 1e6])
def test_any_finite_number_is_a_score(server, ask, score):
    server.replies = [Reply(body={"score": score, "note": "more keys do not matter"})]
    assert ask() == Grade(float(score))


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b"", Outcome.CRASHED),
        (b'{"sco', Outcome.CRASHED),
        (b"[" * 5000, Outcome.CRASHED),
        ([], Outcome.CRASHED),
        (0.5, Outcome.CRASHED),
        ({}, Outcome.CRASHED),
        ({"score": None}, Outcome.CRASHED),
        ({"score": "1"}, Outcome.CRASHED),
        ({"score": True}, Outcome.CRASHED),
        (b'{"score": NaN}', Outcome.NOT_FINITE),
        (b'{"score": 1e999}', Outcome.NOT_FINITE),
        (b'{"score": 1' + b"0" * 400 + b"}", Outcome.NOT_FINITE),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_score(server, ask, body, outcome):
    server.replies = [Reply(body=body)]
    graded = ask()
    assert (graded.score, graded.outcome, list(graded.faults)) == (None, outcome, [Fault.OTHER])
    assert server.url in graded.reason
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_three_times_more(server, ask, pauses, status):
    server.replies = [Reply(status, {})] * 3 + [Reply(body={"score": 1})]
    assert ask() == Grade(1.0)
    assert pauses == [0.5, 1.0, 2.0]
    server.replies, server.requests = [Reply(status, {})], []
    graded = ask()
    assert (graded.score, graded.outcome) == (None, Outcome.CRASHED)
    assert f"status {status}" in graded.reason
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [302, 400, 401, 404])
def test_what_will_not_pass_is_not_tried_again(server, ask, status):
    server.replies = [Reply(status, {"detail": "no"}, headers={"location": "/"})]
    graded = ask()
    assert graded.score is None
    assert f"status {status}" in graded.reason
    assert len(server.requests) == 1


def test_a_service_that_is_too_slow_has_timed_out(server, ask):
    release = threading.Event()
    server.replies = [Reply(body={}, wait=release)]
    graded = ask(timeout_s=0.05, retries=1)
    release.set()
    assert (graded.score, graded.outcome) == (None, Outcome.TIMED_OUT)
    assert len(server.requests) == 2


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_service_that_never_comes_to_its_end_has_timed_out(server, ask, what):
    release = threading.Event()
    server.replies = [Reply(drips=what, wait=release)]
    graded = ask(timeout_s=0.3, retries=1)
    release.set()
    assert (graded.score, graded.outcome) == (None, Outcome.TIMED_OUT)
    assert len(server.requests) == 2


def test_an_answer_that_breaks_off_or_is_too_large(server, ask):
    server.replies = [Reply(body=b'{"score"', claims=100), Reply(body={"score": 1})]
    assert ask() == Grade(1.0)
    server.replies = [Reply(body=b" " * (LARGEST_ANSWER + 1))]
    graded = ask()
    assert f"more than {LARGEST_ANSWER} bytes" in graded.reason
    assert graded.score is None


def test_nobody_there(pauses):
    spec = Endpoint(type="endpoint", name="far", url="http://127.0.0.1:9/")
    grader = EndpointGrader(spec, sleep=pauses.append)
    graded = grader(Observer()(sample()))
    grader.close()
    assert (graded.score, graded.outcome) == (None, Outcome.CRASHED)
    assert len(pauses) == 3
