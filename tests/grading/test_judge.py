"""Judges against a real server on loopback that behaves as servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from graft.grading.build import BuiltGrader, Services, build_grader
from graft.grading.check import parse_grader
from graft.grading.judge_client import AnswersOnDisk, JudgeClient, JudgeServer
from graft.grading.observe import Observer
from graft.grading.pace import Pace
from graft.types import Fault, Grade, Outcome, TokenUsage
from tests.grading.samples import Reply, Scripted, judged, sample, verdict

AT_ONCE = {"retry-after-ms": "1"}
"""What spares the tests the client's pauses."""

SCORE = {
    "type": "score_model",
    "name": "judge",
    "model": "gpt-4o-2024-08-06",
    "input": [
        {"role": "developer", "content": "Rate from 1 to 5."},
        {
            "role": "user",
            "content": [
                "Reference: {{item.answer}}",
                {"type": "input_text", "text": "Answer: {{sample.output_text}}"},
                {
                    "type": "input_image",
                    "image_url": "https://example.org/{{item.answer}}.png",
                    "detail": "low",
                },
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            ],
        },
    ],
    "range": [1, 5],
    "sampling_params": {"seed": 42, "temperature": 1, "top_p": 0.5, "max_completions_tokens": 99},
}
LABEL = {
    "type": "label_model",
    "name": "label",
    "model": "m",
    "input": [{"role": "user", "content": "{{sample.output_text}}"}],
    "labels": ["good", "fair", "bad"],
    "passing_labels": ["good", "fair"],
}
COSINE = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "evaluation_metric": "cosine",
}


@pytest.fixture
def closing() -> Iterator[list[Any]]:
    opened: list[Any] = []
    yield opened
    for one in opened:
        one.close()


@pytest.fixture
def build(server: Scripted, closing: list[Any]):
    def build(spec: dict[str, Any] = SCORE, **options: Any) -> BuiltGrader:
        options = {"retries": 2, "timeout_s": 20.0, "servers": {}, **options}
        servers = options.pop("servers")
        default = JudgeServer(f"{server.url}/v1", "secret", "")
        client = JudgeClient(default, servers, **options)
        grader = build_grader(parse_grader(spec), Services(judges=client), Observer())
        closing.extend([client, grader])
        return grader

    return build


def grade(grader: BuiltGrader, text: str = "four") -> Grade:
    [one] = grader([sample(text, answer="4")])
    return one


def test_what_the_judge_is_asked(server, build):
    server.replies = [judged(verdict(4, "near", "so 4"))]
    graded = grade(build())
    assert graded == Grade(4.0, reason="near; so 4", usage={"judge-1": TokenUsage(11, 7, 3)})
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.body["model"] == "gpt-4o-2024-08-06"
    assert request.body["messages"] == [
        {"role": "system", "content": "Rate from 1 to 5."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Reference: 4"},
                {"type": "text", "text": "Answer: four"},
                {"type": "image_url", "image_url": {"url": "https://example.org/4.png", "detail": "low"}},
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
            ],
        },
    ]
    sampling = {key: request.body[key] for key in ("seed", "temperature", "top_p", "max_completion_tokens")}
    assert sampling == {"seed": 42, "temperature": 1, "top_p": 0.5, "max_completion_tokens": 99}
    form = request.body["response_format"]
    assert form["type"] == "json_schema"
    assert (form["json_schema"]["name"], form["json_schema"]["strict"]) == (
        "float_score_classification",
        True,
    )
    schema = form["json_schema"]["schema"]
    assert list(schema["properties"]) == ["steps", "result"]  # it reasons first
    assert schema["properties"]["result"]["type"] == "number"
    assert "from 1 to 5, both included" in schema["properties"]["result"]["description"]


@pytest.mark.parametrize(
    ("result", "score"),
    [(0, 1.0), (-7.5, 1.0), (3.25, 3.25), (6, 5.0), (1e300, 5.0), (10**400, 5.0), (-(10**400), 1.0)],
    ids=lambda value: f"{str(value)[:9]}",
)
def test_a_score_is_clipped_to_its_range(server, build, result, score):
    server.replies = [judged(verdict(result))]
    assert grade(build()).score == score


@pytest.mark.parametrize(
    "content",
    [
        "", None, "five", '{"steps": [], "resu', "[]", "5", {},
        verdict("5"), verdict(None), verdict(True), verdict([5]),
        '{"result": NaN}', '{"result": Infinity}', "[" * 5000,
    ],
    ids=lambda content: repr(content)[:20],
)  # fmt: skip
def test_an_answer_that_is_no_score_is_a_parse_error(server, build, content):
    server.replies = [judged(content)]
    graded = grade(build())
    assert (graded.score, graded.outcome) == (None, Outcome.CRASHED)
    assert list(graded.faults) == [Fault.MODEL_GRADER_PARSE]
    assert "judge-1" in graded.reason
    assert graded.usage == {"judge-1": TokenUsage(11, 7, 3)}  # it was paid for
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        judged('{"steps": [{"description": "", "conclusion": "\\ud800"}], "result": 3}', model="a\ud800"),
        judged(None, refusal="no \ud800"),
        Reply(400, {"error": {"message": "\ud800"}}),
    ],
)
def test_what_a_judge_says_can_be_written_down(server, build, reply):
    """JSON carries halves of characters, which no file in UTF-8 can hold."""
    server.replies = [reply]
    graded = grade(build())
    assert f"{graded.reason}{graded.usage}".encode().count(b"?") >= 1


def test_an_answer_cut_off_by_its_limit_says_so(server, build):
    server.replies = [judged('{"steps": [', finish="length")]
    assert "cut off at its token limit" in grade(build()).reason


@pytest.mark.parametrize(
    "reply",
    [judged(None, refusal="I cannot help"), judged("", finish="content_filter")],
    ids=["refusal", "filter"],
)
def test_a_refusal_is_its_own_fault(server, build, reply):
    server.replies = [reply]
    graded = grade(build())
    assert (graded.score, list(graded.faults)) == (None, [Fault.MODEL_GRADER_REFUSAL])
    assert "refused" in graded.reason


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_tried_again(server, build, status):
    server.replies = [Reply(status, {"error": {"message": "later"}}, AT_ONCE)] * 2 + [judged(verdict(2))]
    assert grade(build()).score == 2.0
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500])
def test_what_does_not_pass_is_a_server_error(server, build, status):
    server.replies = [Reply(status, {"error": {"message": "never"}}, AT_ONCE)]
    graded = grade(build())
    assert (graded.score, graded.outcome) == (None, Outcome.CRASHED)
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]
    assert str(status) in graded.reason
    assert server.url in graded.reason
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_is_not_tried_again(server, build, status):
    server.replies = [Reply(status, {"error": {"message": "no such model"}})]
    graded = grade(build())
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]
    assert "no such model" in graded.reason
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "broken",
    [
        Reply(body=b'{"id": "x", "choices": [{"mess'),  # half an answer
        Reply(body=b"<html>busy</html>", headers={"content-type": "text/html"}),
        Reply(body={}),
        Reply(body={"choices": []}),
        Reply(body=[1]),
        Reply(body=b"\xff\xfe"),
    ],
    ids=["half", "html", "empty", "no choice", "list", "bytes"],
)
def test_an_answer_that_breaks_off_is_asked_for_again(server, build, broken):
    server.replies = [broken, broken, judged(verdict(3))]
    assert grade(build()).score == 3.0
    server.replies, server.requests = [broken], []
    graded = grade(build(retries=1), "another")
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]
    assert len(server.requests) == 2


def test_a_body_shorter_than_it_claims(server, build):
    server.replies = [Reply(body=b'{"id"', claims=500)]
    graded = grade(build(retries=0))
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]


def test_a_server_that_is_too_slow_has_timed_out(server, build):
    release = threading.Event()
    server.replies = [Reply(body={}, wait=release)]
    graded = grade(build(retries=0, timeout_s=0.05))
    release.set()
    assert (graded.score, graded.outcome) == (None, Outcome.TIMED_OUT)
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]


@pytest.mark.parametrize("what", ["headers", "body"])
def test_a_server_that_never_comes_to_its_end_has_timed_out(server, build, what):
    release = threading.Event()
    server.replies = [Reply(drips=what, wait=release)]
    graded = grade(build(timeout_s=0.3, retries=0))
    release.set()
    assert (graded.score, graded.outcome) == (None, Outcome.TIMED_OUT)
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": "four"}]},
        {"choices": [{"message": [4]}]},
        {"error": {"message": "no GPU left"}},
        b"[" * 100_000,
    ],
    ids=["text", "list", "an error with status 200", "deep"],
)
def test_a_reply_of_another_form_is_a_server_error(server, build, body):
    server.replies = [Reply(body=body)]
    graded = grade(build(retries=1))
    assert (graded.score, list(graded.faults)) == (None, [Fault.MODEL_GRADER_SERVER])
    assert len(server.requests) == 2
    assert isinstance(body, bytes) or "error" not in body or "no GPU left" in graded.reason


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, {"error": "no json_schema here"}, "no json_schema here"),
        (404, b"nothing at this path", "nothing at this path"),
    ],
)
def test_a_refused_request_shows_what_the_server_said(server, build, status, body, words):
    server.replies = [Reply(status, body)]
    assert words in grade(build(retries=0)).reason


def test_a_lost_connection_shows_why(closing):
    client = JudgeClient(JudgeServer("http://127.0.0.1:9/v1", "", ""), {}, retries=0)
    closing.append(client)
    grader = build_grader(parse_grader(SCORE), Services(judges=client), Observer())
    assert "refused" in grade(grader).reason


@pytest.mark.parametrize("cached", [-1, None, [1]], ids=repr)
def test_counts_of_tokens_that_are_none_count_nothing(server, build, cached):
    server.replies = [judged(verdict(3), cached=cached)]
    assert grade(build()).usage == {"judge-1": TokenUsage(prompt=11, completion=7, cached=0)}


def test_nobody_there(closing):
    client = JudgeClient(JudgeServer("http://127.0.0.1:9/v1", "", ""), {}, retries=0)
    closing.append(client)
    grader = build_grader(parse_grader(SCORE), Services(judges=client), Observer())
    graded = grade(grader)
    assert list(graded.faults) == [Fault.MODEL_GRADER_SERVER]
    assert "127.0.0.1:9" in graded.reason


# -- labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "score"), [("good", 1.0), ("fair", 1.0), ("bad", 0.0)])
def test_a_label(server, build, label, score):
    server.replies = [judged(verdict(label))]
    assert grade(build(LABEL)).score == score
    assert server.requests[0].body["response_format"]["json_schema"]["schema"]["properties"]["result"][
        "enum"
    ] == [
        "good",
        "fair",
        "bad",
    ]


@pytest.mark.parametrize("label", ["Good", "", None, 1, ["good"], {"a": 1}], ids=repr)
def test_a_label_that_there_is_not(server, build, label):
    server.replies = [judged(verdict(label))]
    graded = grade(build(LABEL))
    assert (graded.score, list(graded.faults)) == (None, [Fault.MODEL_GRADER_PARSE])
    assert "one of good, fair, bad" in graded.reason


# -- servers, keys, speed -------------------------------------------------------------------------------------


def test_a_model_may_have_a_server_and_a_name_of_its_own(server, build):
    other = JudgeServer(f"{server.url}/other", "key-2", "qwen3-32b")
    server.replies = [judged(verdict(2), model="qwen3-32b")]
    graded = grade(build(servers={"gpt-4o-2024-08-06": other}))
    assert list(graded.usage) == ["qwen3-32b"]
    [request] = server.requests
    assert (request.path, request.body["model"]) == ("/other/chat/completions", "qwen3-32b")
    assert request.headers["authorization"] == "Bearer key-2"


def test_samples_are_judged_side_by_side(server, build):
    """No request is answered before all have come: only concurrent ones get through."""
    together = threading.Barrier(4)

    def answer(request):
        together.wait(timeout=20)
        return judged(verdict(5))

    server.answer = answer
    grader = build()
    with ThreadPoolExecutor(grader.calls_at_once) as pool:
        grades = list(pool.map(lambda text: grade(grader, text), "abcd"))
    assert [g.score for g in grades] == [5.0] * 4
    assert grader.calls_at_once == 16


def test_the_pace_spaces_calls():
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))

    pace = Pace(4.0, clock=lambda: now[0], sleep=sleep)
    for _ in range(3):
        pace.wait()  # the clock stands still
    assert slept == [0.25, 0.5]
    now[0] = 200.0
    pace.wait()
    assert slept == [0.25, 0.5]
    unlimited = Pace(None, clock=lambda: now[0], sleep=sleep)
    unlimited.wait()
    unlimited.wait()
    assert len(slept) == 2


def test_every_attempt_keeps_the_pace(server, build):
    waited = []

    class Counting(Pace):
        def wait(self) -> None:
            waited.append(1)

    server.replies = [Reply(body={}), judged(verdict(3))]
    assert grade(build(pace=Counting(None))).score == 3.0
    assert len(waited) == 2
    server.replies = [Reply(429, {}, AT_ONCE), Reply(503, {}, AT_ONCE), judged(verdict(3))]
    assert grade(build(pace=Counting(None))).score == 3.0
    assert len(waited) == 5  # what the client library repeats counts too


# -- the cache ------------------------------------------------------------------------------------------------


def test_the_same_question_is_asked_once(server, build, tmp_path):
    server.replies = [judged(verdict(4, "near")), judged(verdict(1))]
    cache = AnswersOnDisk(tmp_path)
    first = grade(build(cache=cache))
    again = grade(build(cache=AnswersOnDisk(tmp_path)))  # another run
    assert first.score == again.score == 4.0
    assert again.reason == "near"
    assert again.usage == {"judge-1": TokenUsage()}  # it cost nothing
    assert len(server.requests) == 1
    assert grade(build(cache=cache), "five").score == 1.0  # another completion


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"range": [0, 5]},
        {"input": [{"role": "user", "content": "Otherwise"}]},
        {"sampling_params": {"seed": 43}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_question_is_another_entry(server, build, tmp_path, change):
    server.replies = [judged(verdict(4)), judged(verdict(2))]
    cache = AnswersOnDisk(tmp_path)
    assert grade(build(cache=cache)).score == 4.0
    assert grade(build({**SCORE, **change}, cache=cache)).score == 2.0


def test_failures_are_not_kept(server, build, tmp_path):
    server.replies = [judged("no JSON"), judged(None, refusal="no"), Reply(400, {}), judged(verdict(2))]
    grader = build(cache=AnswersOnDisk(tmp_path))
    assert [grade(grader).score for _ in range(4)] == [None, None, None, 2.0]


@pytest.mark.parametrize("result", ["high", None, True, float("inf")], ids=repr)
def test_an_answer_without_a_score_is_not_kept(server, build, tmp_path, result):
    server.replies = [judged(verdict(result)), judged(verdict(2))]
    grader = build(cache=AnswersOnDisk(tmp_path))
    assert [grade(grader).score for _ in range(3)] == [None, 2.0, 2.0]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"value": 3}', '{"model": "x"}', '{"value": {"result": "x"}}']
)
def test_a_damaged_entry_is_asked_again(server, build, tmp_path, content):
    server.replies = [judged(verdict(4)), judged(verdict(2)), judged(verdict(3))]
    grader = build(cache=AnswersOnDisk(tmp_path))
    assert grade(grader).score == 4.0
    [entry] = [path for path in tmp_path.rglob("*") if path.is_file()]
    entry.write_text(content)
    assert grade(grader).score == 2.0
    assert json.loads(entry.read_text())["value"]["result"] == 2


def test_a_folder_that_cannot_be_written_costs_the_cache_alone(server, build, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("")
    server.replies = [judged(verdict(4))]
    assert grade(build(cache=AnswersOnDisk(Path(taken)))).score == 4.0


# -- cosine ---------------------------------------------------------------------------------------------------


def vectors(*values: list[Any]) -> Reply:
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(values)]
    usage = {"prompt_tokens": 9, "total_tokens": 9}
    return Reply(body={"object": "list", "model": "e", "data": data, "usage": usage})


@pytest.fixture
def build_cosine(server, build):
    def build_cosine(**options: Any) -> BuiltGrader:
        embedding = JudgeServer(f"{server.url}/v1", "k", "e-1")
        return build(COSINE, servers={"text-embedding-3-large": embedding}, **options)

    return build_cosine


@pytest.mark.parametrize(
    ("left", "right", "score"),
    [
        ([1, 0], [2, 0], 1.0),
        ([3, 4], [4, 3], 0.96),
        ([1, 0], [0, 1], 0.0),
        ([1, 0], [-1, 0], 0.0),
        ([0, 0], [1, 0], 0.0),
    ],
)
def test_cosine_by_hand(server, build_cosine, left, right, score):
    server.replies = [vectors(left, right)]
    graded = grade(build_cosine())
    assert graded.score == pytest.approx(score)
    assert graded.usage == {"e-1": TokenUsage(prompt=9)}
    [request] = server.requests
    assert request.path == "/v1/embeddings"
    assert (request.body["model"], request.body["input"]) == ("e-1", ["four", "4"])


def test_empty_texts_are_not_sent(server, build_cosine):
    assert grade(build_cosine(), "").score == 0.0
    assert server.requests == []


@pytest.mark.parametrize(
    "reply",
    [
        vectors([1.0]), vectors([], []), vectors(["a"], ["b"]), Reply(body={}),
        vectors([1, 0], [1, 0, 0]), vectors([10**400], [1]), vectors([1e308, 1e308], [1e308, 1e308]),
    ],
)  # fmt: skip
def test_vectors_that_cannot_be_compared(server, build_cosine, reply):
    server.replies = [reply]
    graded = grade(build_cosine(retries=0))
    assert (graded.score, list(graded.faults)) == (None, [Fault.MODEL_GRADER_SERVER])


def test_vectors_are_kept(server, build_cosine, tmp_path):
    server.replies = [vectors([3, 4], [4, 3])]
    grader = build_cosine(cache=AnswersOnDisk(tmp_path))
    assert grade(grader).score == grade(grader).score == pytest.approx(0.96)
    assert len(server.requests) == 1
