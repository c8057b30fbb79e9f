"""OpenAI's grader contract, row by row: every id names a rule, with the section of the contract's description.

Sections: 3 graders, 3.1 string_check, 3.2 text_similarity, 3.3 score_model, 3.4 label_model, 3.5 python, 3.6 multi, 3.7
endpoint, 4 templates, 5.1 validate, 5.2 run. Ids with `ours` are decisions where OpenAI's behaviour is not documented;
`docs/openai-rft.md` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from graft.grading.build import Services, build_grader
from graft.grading.check import check_grader, dump_grader, parse_grader
from graft.grading.judge_client import JudgeClient, JudgeServer
from graft.grading.observe import Observer
from graft.grading.response import run_response
from graft.grading.sandbox import SandboxResult
from graft.types import Outcome
from tests.grading.samples import Reply, judged, sample, sandbox_result, verdict
from tests.grading.test_response import FLAGS

OUT, ANSWER = "{{sample.output_text}}", "{{item.answer}}"


def check(operation: str = "eq", input_: str = OUT, reference: str = ANSWER) -> dict[str, Any]:
    return {
        "type": "string_check",
        "name": "c",
        "input": input_,
        "reference": reference,
        "operation": operation,
    }


def similar(metric: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "text_similarity",
        "name": "s",
        "input": OUT,
        "reference": ANSWER,
        "evaluation_metric": metric,
        **more,
    }


def multi(formula: str, **graders: Any) -> dict[str, Any]:
    return {
        "type": "multi",
        "name": "m",
        "graders": graders or {"a": check(), "b": check("ne")},
        "calculate_output": formula,
    }


def score(content: Any = OUT, **more: Any) -> dict[str, Any]:
    return {
        "type": "score_model",
        "name": "j",
        "model": "any",
        "input": [{"role": "user", "content": content}],
        **more,
    }


def label(**more: Any) -> dict[str, Any]:
    labels = {"labels": ["good", "bad"], "passing_labels": ["good"], **more}
    return {
        "type": "label_model",
        "name": "l",
        "model": "any",
        "input": [{"role": "user", "content": OUT}],
        **labels,
    }


def python(source: str = "def grade(sample, item):\n    return 1.0\n", **more: Any) -> dict[str, Any]:
    return {"type": "python", "name": "p", "source": source, **more}


ENDPOINT = {"type": "endpoint", "name": "e", "url": "https://example.org/"}


def nameless(grader: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in grader.items() if key != "name"}


# -- what is a grader (3, 5.1) --------------------------------------------------------------------------------

TAKEN = [
    ("3-string_check-at-the-top", check()),
    ("3-text_similarity-at-the-top", similar("bleu")),
    ("3-score_model-at-the-top", score()),
    ("3-python-at-the-top", python()),
    ("3-multi-at-the-top", multi("a+b")),
    ("3-ours-label_model-at-the-top-too", label()),
    ("3-endpoint-at-the-top", ENDPOINT),
    ("3-string_check-inside-multi", multi("x", x=check())),
    ("3-text_similarity-inside-multi", multi("x", x=similar("gleu"))),
    ("3-score_model-inside-multi", multi("x", x=score())),
    ("3-label_model-inside-multi", multi("x", x=label())),
    ("3-python-inside-multi", multi("x", x=python())),
    ("3-endpoint-inside-multi", multi("x", x=ENDPOINT)),
    ("3-name-may-be-missing", nameless(check())),
    ("3-name-may-be-missing-inside-multi", multi("x", x=nameless(python()))),
    ("3-pass_threshold-is-kept", {**check(), "pass_threshold": 0.5}),
    ("3-pass_threshold-is-kept-inside-multi", multi("x", x={**check(), "pass_threshold": 0.5})),
    *((f"3.2-{m}-is-a-metric", similar(m)) for m in ("cosine", "fuzzy_match", "bleu", "gleu", "meteor", "rouge_l")),
    *((f"3.2-rouge_{n}-is-a-metric", similar(f"rouge_{n}")) for n in range(1, 6)),
    ("3.3-content-is-a-text", score("Rate it")),
    ("3.3-content-is-an-input_text", score({"type": "input_text", "text": "x"})),
    ("3.3-content-is-an-output_text", score({"type": "output_text", "text": "x"})),
    ("3.3-content-is-an-image", score({"type": "input_image", "image_url": "https://x/y.png", "detail": "high"})),
    ("3.3-detail-is-optional", score({"type": "input_image", "image_url": "https://x/y.png"})),
    ("3.3-content-is-audio", score({"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}})),
    ("3.3-content-is-a-list", score(["x", {"type": "input_text", "text": "y"}])),
    *(
        (f"3.3-role-{role}", {**score(), "input": [{"role": role, "content": "x", "type": "message"}]})
        for role in ("user", "assistant", "system", "developer")
    ),
    ("3.3-any-model-id", {**score(), "model": "gpt-5-mini"}),
    ("3.3-range", score(range=[-1, 10])),
    ("3.3-sampling_params", score(sampling_params={"seed": 1, "top_p": 1, "temperature": 0.5})),
    ("3.3-max_completions_tokens", score(sampling_params={"max_completions_tokens": 9})),
    ("3.3-ours-max_tokens-is-an-alias", score(sampling_params={"max_tokens": 9})),
    *(
        (f"3.3-reasoning_effort-{effort}", score(sampling_params={"reasoning_effort": effort}))
        for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")
    ),
    ("3.3-sampling_params-are-nullable", score(sampling_params={"seed": None, "top_p": None})),
    ("3.4-passing_labels-are-a-subset", label(labels=["a", "b"], passing_labels=["a", "b"])),
    ("3.5-image_tag-is-kept", python(image_tag="2025-05-08")),
    ("3.5-other-functions-are-free", python("def f():\n    return 1\ndef grade(sample, item):\n    return f()\n")),
    ("3.6-functions", multi("min(a,b)+max(a,b)+abs(a)+floor(a)+ceil(a)+exp(a)+sqrt(a)+log(b)")),
    ("3.6-operators", multi("(a + b) * 2 - 1 / 2 ^ 2")),
    ("3.6-ours-unary-minus", multi("-a")),
    ("3.7-headers-and-rate_limit", {**ENDPOINT, "headers": {"x-key": "1"}, "rate_limit": 50}),
]  # fmt: skip


@pytest.mark.parametrize("grader", [grader for _, grader in TAKEN], ids=[name for name, _ in TAKEN])
def test_taken(grader):
    echo = dump_grader(parse_grader(grader))
    assert dump_grader(parse_grader(echo)) == echo  # 5.1: the normalised grader
    assert echo["name"]


REFUSED = [
    ("3-multi-not-inside-multi", multi("x", x=multi("a")), "inside another"),
    ("3-unknown-type", {**check(), "type": "string_chck"}, "Did you mean 'string_check'"),
    ("3.1-neq-is-spelled-ne", check("neq"), 'wants "ne"'),
    ("3.1-operations-are-four", check("contains"), "'eq', 'ne', 'like' or 'ilike'"),
    ("3.1-input-is-required", {k: v for k, v in check().items() if k != "input"}, "$.input: got nothing"),
    ("3.2-metrics-are-eleven", similar("rouge_6"), "$.evaluation_metric"),
    ("3.3-range-is-two-numbers", score(range=[0, 1, 2]), "$.range"),
    (
        "3.3-a-limit-is-at-least-1",
        score(sampling_params={"max_completions_tokens": 0}),
        "greater than or equal to 1",
    ),
    ("3.3-roles-are-four", {**score(), "input": [{"role": "tool", "content": "x"}]}, "$.input[0].role"),
    ("3.4-passing_labels-must-be-labels", label(passing_labels=["fine"]), "only what is in labels"),
    ("3.5-grade-must-be-there", python("x = 1"), "grade(sample, item)"),
    ("3.5-grade-takes-two-arguments", python("def grade(sample):\n    return 1\n"), "grade(sample, item)"),
    ("3.5-source-is-below-256-kB", python("#" * 262_145), "262144 bytes"),
    ("3.6-graders-is-no-single-grader", {**multi("a"), "graders": check()}, "$.graders"),
    ("3.6-formula-must-parse", multi("a +"), "ends too early"),
    ("3.6-variables-must-be-keys", multi("a + c"), "the variable 'c'"),
    ("3.6-variables-are-not-names", multi("c", x=check()), "the variable 'c'"),  # the member's name is c
    ("3.6-no-double-star", multi("a ** 2"), "a power is written ^"),
    ("3.6-no-comparison", multi("a > b"), "'>'"),
    ("3.6-no-conditional", multi("a if b else 0"), "'if'"),
    ("3.6-no-modulo", multi("a % 2"), "'%'"),
    ("3.6-no-other-function", multi("round(a)"), "one of the functions"),
    ("3.6-ours-keys-are-names", multi("1", **{"a-b": check()}), "'a-b'"),
    ("4-unclosed-braces", check(input_="{{item.a"), "not closed"),
    ("4-ours-no-variable-of-another-name", check(input_="{{sample.reasoning}}"), "which no sample has"),
    ("4-unknown-namespace", check(input_="{{row.a}}"), "no namespace 'row'"),
    ("4-no-filters", check(input_="{{item.a | lower}}"), "is no path"),
    ("4-no-expressions", check(input_="{{item.a + 1}}"), "is no path"),
    ("4-no-wildcards", check(input_="{{item.a[*]}}"), "is no path"),
    ("4-no-negative-positions", check(input_="{{item.a[-1]}}"), "is no path"),
    ("4-no-quoted-keys", check(input_="{{item['a']}}"), "is no path"),
]


@pytest.mark.parametrize(("grader", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(grader, words):
    spec, problems = check_grader(grader)
    assert spec is None
    assert any(words in str(problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("graders", "formula", "keys"),
    [
        pytest.param([similar("bleu"), check()], "text_similarity_score + string_check_score",
                     ["text_similarity_score", "string_check_score"], id="3.6-ours-a-list-by-type"),
        pytest.param([{**check(), "name": "x"}, {**check(), "name": "y"}], "x + y", ["x", "y"],
                     id="3.6-ours-a-list-by-name"),
        pytest.param({"x": check()}, "x", ["x"], id="3.6-a-map"),
    ],
)  # fmt: skip
def test_multi_is_echoed_as_a_map(graders, formula, keys):
    echo = dump_grader(parse_grader({**multi(formula), "graders": graders}))
    assert list(echo["graders"]) == keys


# -- running (3, 4, 5.2) --------------------------------------------------------------------------------------

ITEM = {
    "answer": "Paris",
    "n": 4,
    "x": 0.5,
    "yes": True,
    "nothing": None,
    "list": [{"k": "v"}, 2],
    "meta": {"date": "today"},
    "messages": [{"role": "user", "content": "hi"}],
}


def run(grader: dict[str, Any], text: str, services: Services | None = None) -> dict[str, Any]:
    """As `graders.run`: any JSON is read, failures are 0 with a flag."""
    spec = parse_grader(grader)
    built = build_grader(spec, services or Services(), Observer(any_json=True), zero=True)
    [grade] = built([sample(text, **ITEM)])
    built.close()
    response = run_response(spec, grade, seconds=0.5)
    json.dumps(response)
    return response


RUNS = [
    ("3.1-eq-equal", check("eq"), "Paris", 1, ()),
    ("3.1-eq-minds-case", check("eq"), "paris", 0, ()),
    ("3.1-ne", check("ne"), "paris", 1, ()),
    ("3.1-like-input-contains-reference", check("like"), "It is Paris.", 1, ()),
    ("3.1-like-not-the-other-way-round", check("like", ANSWER, OUT), "It is Paris.", 0, ()),
    ("3.1-like-minds-case", check("like"), "it is paris", 0, ()),
    ("3.1-like-has-no-wildcards", check("like", reference="%"), "Paris", 0, ()),
    ("3.1-ilike", check("ilike"), "IT IS PARIS", 1, ()),
    ("3.1-ours-ilike-folds-case", check("ilike", reference="straße"), "STRASSE", 1, ()),
    ("3.1-ours-no-trimming", check("eq"), "Paris ", 0, ()),
    ("3.1-a-number-compares-as-its-text", check(reference="{{item.n}}"), "4", 1, ()),
    ("3.2-pass_threshold-does-not-change-the-reward", similar("rouge_1", pass_threshold=0.9), "in Paris", 2 / 3, ()),
    ("3.2-ours-fuzzy_match-is-WRatio", similar("fuzzy_match"), "paris!", 1, ()),
    ("3.2-ours-bleu-is-sacrebleu-effective-order", similar("bleu"), "Paris", 1, ()),
    ("3.2-gleu", similar("gleu"), "Paris", 1, ()),
    *((f"3.2-rouge_{n}-of-one-word", similar(f"rouge_{n}"), "Paris", float(n == 1), ()) for n in range(1, 6)),
    ("3.2-rouge_l", similar("rouge_l"), "in Paris", 2 / 3, ()),
    ("3.2-ours-empty-against-text", similar("rouge_l"), "", 0, ("unresponsive_reward_error",)),
    ("3.2-ours-empty-against-empty", {**similar("bleu"), "reference": ""}, "", 1, ("unresponsive_reward_error",)),
    ("3.6-formula", multi("0.2*a + 0.8*b"), "Rome", 0.8, ()),
    ("3.6-any-finite-number-is-a-reward", multi("3*a - 7"), "Paris", -4, ()),
    ("3.6-power", multi("2 ^ (3*a)"), "Paris", 8, ()),
    ("3.6-ours-log-is-natural", multi("log(exp(2*a))"), "Paris", 2, ()),
    ("3.6-ours-division-by-zero-is-0-and-flagged", multi("1/b"), "Paris", 0, ("other_error",)),
    ("3.6-ours-overflow-is-0-and-flagged", multi("exp(1000*a)"), "Paris", 0, ("other_error",)),
    (
        "3.6-a-failed-member-is-0-and-the-formula-runs",
        multi("0.5*a + 0.5*b + 0.1", a=check(), b=check(reference="{{item.gone}}")),
        "Paris",
        0.6,
        ("invalid_variable_error",),
    ),
    ("4-spaces-are-optional", check(reference="{{item.answer}}", input_="{{ sample.output_text }}"), "Paris", 1, ()),
    ("4-dotted-keys", check(reference="{{item.meta.date}}"), "today", 1, ()),
    ("4-list-positions", check(reference="{{item.list[0].k}}"), "v", 1, ()),
    ("4-many-in-one-text", check(reference="{{item.n}}-{{item.answer}}!"), "4-Paris!", 1, ()),
    ("4-item-messages", check(reference="{{item.messages[0].content}}"), "hi", 1, ()),
    ("4-choices", check(input_="{{sample.choices[0].message.content}}"), "Paris", 1, ()),
    ("4-ours-numbers-print-as-json", check(reference="{{item.x}}"), "0.5", 1, ()),
    ("4-ours-booleans-print-as-json", check(reference="{{item.yes}}"), "true", 1, ()),
    ("4-ours-null-prints-as-json", check(reference="{{item.nothing}}"), "null", 1, ()),
    ("4-ours-objects-print-as-compact-json", check(reference="{{item.list}}"), '[{"k":"v"},2]', 1, ()),
    ("4-ours-a-namespace-alone-is-json", check("like", "{{item}}", '"answer":"Paris"'), "x", 1, ()),
    ("4-a-missing-path-scores-0", check(reference="{{item.gone}}"), "Paris", 0, ("invalid_variable_error",)),
    ("4-output_json-where-the-sample-is-json", check(input_="{{sample.output_json.a}}"), '{"a": "Paris"}', 1, ()),
    ("4-no-output_json-otherwise", check(input_="{{sample.output_json.a}}"), "Paris", 0, ("invalid_variable_error",)),
    ("4-no-output_tools", check(input_="{{sample.output_tools[0].id}}"), "x", 0, ("invalid_variable_error",)),
    ("4-what-is-inserted-is-no-template", check(input_="{{sample.output_text}}", reference="{{item.answer}}"),
     "{{item.answer}}", 0, ()),
    ("5.2-ours-an-empty-sample-is-unresponsive", check(), "", 0, ("unresponsive_reward_error",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("grader", "text", "reward", "raised"), [r[1:] for r in RUNS], ids=[r[0] for r in RUNS]
)
def test_run(grader, text, reward, raised):
    response = run(grader, text)
    assert response["reward"] == pytest.approx(reward)
    assert response["metadata"]["errors"] == {**FLAGS, **dict.fromkeys(raised, True)}
    assert response["metadata"]["type"] == grader["type"]
    assert response["metadata"]["name"] == grader["name"]
    assert response["metadata"]["execution_time"] == 0.5


def test_52_sub_rewards_by_key():
    response = run(multi("a + b", a={**check(), "name": "other"}, b=check("ne")), "Paris")
    assert response["sub_rewards"] == response["metadata"]["scores"] == {"a": 1.0, "b": 0.0}


def test_52_one_grader_has_no_sub_rewards():
    response = run(check(), "Paris")
    assert response["sub_rewards"] == response["metadata"]["scores"] == {}
    assert response["model_grader_token_usage_per_model"] == {}
    assert response["metadata"]["token_usage"] is response["metadata"]["sampled_model_name"] is None


# -- judges (3.3, 3.4) ----------------------------------------------------------------------------------------


@pytest.fixture
def judges(server) -> Iterator[Services]:
    client = JudgeClient(JudgeServer(f"{server.url}/v1", "k", ""), {}, retries=0)
    yield Services(judges=client)
    client.close()


JUDGED = [
    ("3.3-the-result-is-the-reward", score(), judged(verdict(0.25)), 0.25, ()),
    ("3.3-the-default-range-is-0-to-1", score(), judged(verdict(7)), 1, ()),
    ("3.3-above-the-range-is-clipped", score(range=[1, 5]), judged(verdict(9)), 5, ()),
    ("3.3-below-the-range-is-clipped", score(range=[1, 5]), judged(verdict(0)), 1, ()),
    ("3.3-the-reward-is-not-rescaled", score(range=[0, 10]), judged(verdict(5)), 5, ()),
    ("3.3-what-is-no-number-scores-0", score(), judged(verdict("high")), 0, ("model_grader_parse_error",)),
    ("3.3-no-json-scores-0", score(), judged("0.7 or so"), 0, ("model_grader_parse_error",)),
    ("3.3-a-refusal-is-flagged", score(), judged(None, refusal="no"), 0, ("model_grader_refusal_error",)),
    ("3.3-a-failed-call-is-flagged", score(), Reply(500, {}), 0, ("model_grader_server_error",)),
    ("3.4-a-passing-label-is-1", label(), judged(verdict("good")), 1, ()),
    ("3.4-another-label-is-0", label(), judged(verdict("bad")), 0, ()),
    (
        "3.4-ours-no-label-at-all-is-a-parse-error",
        label(),
        judged(verdict("ok")),
        0,
        ("model_grader_parse_error",),
    ),
]


@pytest.mark.parametrize(
    ("grader", "reply", "reward", "raised"), [r[1:] for r in JUDGED], ids=[r[0] for r in JUDGED]
)
def test_judged(server, judges, grader, reply, reward, raised):
    server.replies = [reply]
    response = run(grader, "Paris", judges)
    assert response["reward"] == pytest.approx(reward)
    errors = response["metadata"]["errors"]
    details = errors.pop("model_grader_server_error_details")
    assert ("500" in details) if "model_grader_server_error" in raised else details is None
    flags = {key: value for key, value in FLAGS.items() if key != "model_grader_server_error_details"}
    assert errors == {**flags, **dict.fromkeys(raised, True)}


def test_33_the_judge_answers_in_a_form_that_the_server_adds(server, judges):
    server.replies = [judged(verdict(1), model="judge-9", prompt=5, completion=2, cached=1)]
    response = run(score(), "Paris", judges)
    form = server.requests[0].body["response_format"]["json_schema"]
    assert (form["name"], form["strict"]) == ("float_score_classification", True)
    assert list(form["schema"]["properties"]) == form["schema"]["required"] == ["steps", "result"]
    step = form["schema"]["properties"]["steps"]["items"]
    assert step["required"] == ["description", "conclusion"]
    tokens = {"prompt_tokens": 5, "total_tokens": 7, "completion_tokens": 2, "cached_tokens": 1}
    assert response["metadata"]["token_usage"] == tokens
    assert response["model_grader_token_usage_per_model"] == {"judge-9": tokens}
    assert response["metadata"]["sampled_model_name"] == "judge-9"


# -- python (3.5) ---------------------------------------------------------------------------------------------


FAILED = {"python_grader_runtime_error": True, "python_grader_runtime_error_details": "Traceback: x"}
CALLS = [
    ("3.5-the-number-is-the-reward", sandbox_result(0.25), 0.25, {}),
    ("3.5-any-finite-number", sandbox_result(-17.5), -17.5, {}),
    (
        "3.5-an-exception-scores-0-with-its-traceback",
        sandbox_result(None, Outcome.CRASHED, "Traceback: x"),
        0,
        FAILED,
    ),
    ("3.5-nan-is-an-invalid-result", sandbox_result(None, Outcome.NOT_FINITE, "Traceback: x"), 0, FAILED),
    (
        "3.5-ours-a-timeout-is-a-runtime-error",
        sandbox_result(None, Outcome.TIMED_OUT, "Traceback: x"),
        0,
        FAILED,
    ),
]


@pytest.mark.parametrize(("result", "reward", "raised"), [r[1:] for r in CALLS], ids=[r[0] for r in CALLS])
def test_python(result, reward, raised):
    response = run(python(), "Paris", Services(run_grade=lambda source, calls: [result for _ in calls]))
    assert response["reward"] == reward
    assert response["metadata"]["errors"] == {**FLAGS, **raised}


def test_35_sample_comes_first_and_item_is_the_whole_row():
    seen: list[Any] = []

    def run_grade(source: str, calls: Sequence[Any]) -> list[SandboxResult]:
        seen.extend((source, *call) for call in calls)
        return [sandbox_result(1.0) for _ in calls]

    source = 'def grade(sample, item):\n    return "{{item.answer}}" == 1\n'
    run(python(source), '{"a": 1}', Services(run_grade=run_grade))
    [(given, sample_, item)] = seen
    assert given == source  # no template is expanded in it
    assert item == ITEM
    assert sample_["output_text"] == '{"a": 1}'
    assert sample_["output_json"] == {"a": 1}
    assert (sample_["output_tools"], sample_["output_audio"]) == ([], None)
    assert sample_["choices"][0]["message"]["content"] == '{"a": 1}'


# -- endpoint (3.7) -------------------------------------------------------------------------------------------


def test_37_request_and_response(server):
    server.replies = [Reply(body={"score": 0.75})]
    response = run({**ENDPOINT, "url": f"{server.url}/grade"}, "Paris")
    assert (response["reward"], response["metadata"]["errors"]) == (0.75, FLAGS)
    [request] = server.requests
    assert set(request.body) == {"sample", "item", "trace_id"}
    assert request.body["item"] == ITEM


def test_37_ours_a_failure_is_an_other_error(server):
    server.replies = [Reply(400, {})]
    response = run({**ENDPOINT, "url": f"{server.url}/grade"}, "Paris")
    assert (response["reward"], response["metadata"]["errors"]) == (0.0, {**FLAGS, "other_error": True})
