"""The judge critic against a real server on loopback that misbehaves as servers do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from graft.critics.judge import JudgeCritic, earliest_error_scores
from graft.errors import DataError
from graft.grading.judge_client import AnswersOnDisk, JudgeClient, JudgeServer
from graft.types import Critique, Outcome, TokenUsage
from tests.critics.chains import SARAH, behind, make_chain
from tests.grading.samples import Reply, Request, Scripted, judged

CHAIN = make_chain("50 - 15 = 35\n", "35 - 10 = 24\n", answer="Answer: 49", score=0.0, answer_key="50")
SCORES = {
    "thought_1": {"reason": "right", "thought": 9, "progress": 5},
    "thought_2": {"reason": "35 - 10 is 25", "thought": 0.5, "progress": 2},
}


@pytest.fixture
def ask(server: Scripted) -> Iterator[Any]:
    opened: list[JudgeClient] = []

    def ask(
        *chains: Any,
        retries: int = 2,
        timeout_s: float = 20.0,
        cache: AnswersOnDisk | None = None,
        **options: Any,
    ) -> list[Critique]:
        client = JudgeClient(
            JudgeServer(f"{server.url}/v1", "secret", ""),
            {},
            retries=retries,
            timeout_s=timeout_s,
            cache=cache,
        )
        opened.append(client)
        return JudgeCritic(client, "judge", scale=10, **options)(chains or (CHAIN,))

    yield ask
    for client in opened:
        client.close()


def test_the_judge_reads_the_conversation_as_it_stands(server, ask):
    code = "What does this print?\n\n```python\nif a:\n    b()\n```"
    chain = make_chain("it prints 2", question="a = 2")
    server.replies = [judged({"thought_1": SCORES["thought_1"]})]
    ask(behind(chain, ("developer", "b prints a."), ("user", code), ("assistant", "Which a?")))
    told = json.loads(server.requests[0].body["messages"][1]["content"])
    assert told["before_the_question"] == [
        {"role": "developer", "content": "b prints a."},
        {"role": "user", "content": code},
        {"role": "assistant", "content": "Which a?"},
    ]
    assert told["question"] == "a = 2"


def test_all_thoughts_in_one_question(server, ask):
    server.replies = [judged(SCORES)]
    [critique] = ask(sampling={"temperature": 0})
    assert critique.outcome is Outcome.GRADED
    assert critique.thoughts == (9, 0.5)
    assert critique.progress == (5, 2)
    assert critique.reasons == ("right", "35 - 10 is 25")
    assert critique.overall == 0  # the grade's
    assert critique.calls == 1
    assert critique.usage == {"judge-1": TokenUsage(11, 7, 3)}
    assert critique.sampled_tokens == 0
    [request] = server.requests
    assert request.body["temperature"] == 0
    system, user = request.body["messages"]
    assert "0 to 10" in system["content"]
    assert json.loads(user["content"]) == {
        "question": SARAH,
        "thoughts": {"1": "50 - 15 = 35", "2": "35 - 10 = 24"},
        "final_answer": "Answer: 49",
    }
    form = request.body["response_format"]["json_schema"]
    assert form["strict"] is True
    assert form["schema"]["required"] == ["thought_1", "thought_2"]
    assert form["schema"]["properties"]["thought_2"]["required"] == ["reason", "thought", "progress"]


def test_the_whole_may_be_judged_too(server, ask):
    server.replies = [judged({**SCORES, "overall": 3})]
    [critique] = ask(judge_overall=True, instructions="Be kind {really}.", reference_key="answer_key")
    assert critique.overall == 3
    [request] = server.requests
    system, user = request.body["messages"]
    assert system["content"].endswith("Be kind {really}.")
    assert json.loads(user["content"])["right_answer"] == "50"
    assert "overall" in request.body["response_format"]["json_schema"]["schema"]["required"]


def test_a_row_without_the_reference(ask):
    with pytest.raises(DataError, match=r"no key 'solution'.*Keys of the row: answer_key"):
        ask(reference_key="solution")


def test_scores_outside_are_clipped(server, ask):
    server.replies = [judged({**SCORES, "thought_1": {"reason": "", "thought": 10**400, "progress": -1}})]
    [critique] = ask()
    assert (critique.thoughts[0], critique.progress[0]) == (10, 0)


@pytest.mark.parametrize(
    ("error", "thoughts", "progress"),
    [
        (0, (10, 10, 10, 10), (2.5, 5, 7.5, 10)),
        (1, (0, 5, 5, 5), (0, 0, 0, 0)),
        (3, (10, 10, 0, 5), (2.5, 5, 5, 5)),
        (4, (10, 10, 10, 0), (2.5, 5, 7.5, 7.5)),
    ],
)
def test_scores_from_the_earliest_error(error, thoughts, progress):
    assert earliest_error_scores(error, 4, 10) == (thoughts, progress)


def test_earliest_error(server, ask):
    server.replies = [judged({"reason": "35 - 10 is 25", "earliest_error": 2})]
    [critique] = ask(form="earliest_error")
    assert critique.thoughts == (10, 0)
    assert critique.progress == (5, 5)
    assert critique.reasons == ("", "35 - 10 is 25")


@pytest.mark.parametrize("error", [3, -1, 1.5, True, "2", None])
def test_an_earliest_error_that_is_none_of_the_thoughts(server, ask, error):
    server.replies = [judged({"reason": "", "earliest_error": error})]
    [critique] = ask(form="earliest_error")
    assert critique.outcome is Outcome.CRASHED
    assert critique.thoughts == ()
    assert "earliest_error" in critique.problem


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (judged({"thought_1": SCORES["thought_1"]}), "KeyError: 'thought_2'"),
        (judged({**SCORES, "thought_1": {"reason": "", "thought": "9", "progress": 5}}), "finite number"),
        (
            judged('{"thought_1": {"reason": "", "thought": NaN, "progress": 1}, "thought_2": 1}'),
            "finite number",
        ),
        (judged({**SCORES, "thought_2": None}), "TypeError"),
        (judged("no JSON"), "no JSON"),
        (judged([1]), "no JSON object"),
        (judged(None, refusal="I will not"), "refused: I will not"),
        (judged('{"thought_1": {"reas', finish="length"), "cut off at its token limit"),
        (Reply(status=400, body={"error": {"message": "bad schema"}}), "bad schema"),
    ],
)
def test_failures_of_the_judge_are_outcomes(server, ask, reply, words):
    server.replies = [reply]
    [critique] = ask()
    assert critique.outcome is Outcome.CRASHED
    assert not critique.scored
    assert words in critique.problem
    assert (critique.overall, critique.thoughts, critique.progress) == (None, (), ())
    assert critique.calls == 1


def test_a_server_that_is_down_for_a_while(server, ask):
    at_once = {"retry-after-ms": "1"}
    server.replies = [Reply(503, {}, at_once), Reply(429, {}, at_once), judged(SCORES)]
    assert ask()[0].thoughts == (9, 0.5)
    assert len(server.requests) == 3


def test_a_server_that_never_answers(server, ask):
    never = threading.Event()
    server.replies = [Reply(wait=never, body={})]
    try:
        [critique] = ask(retries=0, timeout_s=0.05)
    finally:
        never.set()
    assert critique.outcome is Outcome.TIMED_OUT


def test_one_failure_spoils_no_other_chain(server, ask):
    def answer(request: Request) -> Reply:
        asked = json.loads(request.body["messages"][1]["content"])
        return judged("oops" if asked["thoughts"]["1"] == "bad" else {"thought_1": SCORES["thought_1"]})

    server.answer = answer
    chains = [make_chain("good"), make_chain("bad"), make_chain("fine")]
    critiques = ask(*chains, calls_at_once=3)
    assert [critique.outcome for critique in critiques] == [Outcome.GRADED, Outcome.CRASHED, Outcome.GRADED]


def test_the_same_question_is_asked_once(server, ask, tmp_path):
    server.replies = [judged(SCORES)]
    first, second = (ask(cache=AnswersOnDisk(tmp_path))[0] for _ in range(2))
    assert first.thoughts == second.thoughts
    assert len(server.requests) == 1
    assert second.usage == {"judge-1": TokenUsage()}


def test_nothing_to_ask_about(server, ask):
    [critique] = ask(make_chain(score=1.0))
    assert critique == Critique(overall=10, seconds=critique.seconds)
    assert server.requests == []
