"""Grades on OpenAI's wire."""

from __future__ import annotations

import json

import pytest

from graft.grading.check import parse_grader
from graft.grading.response import run_response
from graft.types import Fault, Grade, Outcome, TokenUsage

CHECK = {"type": "string_check", "name": "exact", "input": "a", "reference": "b", "operation": "eq"}
MULTI = {
    "type": "multi",
    "name": "total",
    "graders": {"fmt": CHECK, "acc": CHECK},
    "calculate_output": "0.2*fmt + 0.8*acc",
}

FLAGS = {
    "formula_parse_error": False,
    "sample_parse_error": False,
    "truncated_observation_error": False,
    "unresponsive_reward_error": False,
    "invalid_variable_error": False,
    "other_error": False,
    "python_grader_server_error": False,
    "python_grader_server_error_type": None,
    "python_grader_runtime_error": False,
    "python_grader_runtime_error_details": None,
    "model_grader_server_error": False,
    "model_grader_refusal_error": False,
    "model_grader_parse_error": False,
    "model_grader_server_error_details": None,
}
"""The 14 keys."""


def test_one_grader():
    response = run_response(parse_grader(CHECK), Grade(1.0), seconds=0.25)
    assert response == {
        "reward": 1.0,
        "metadata": {
            "name": "exact",
            "type": "string_check",
            "errors": FLAGS,
            "execution_time": 0.25,
            "scores": {},
            "token_usage": None,
            "sampled_model_name": None,
        },
        "sub_rewards": {},
        "model_grader_token_usage_per_model": {},
    }
    assert json.loads(json.dumps(response)) == response


def test_several_graders_with_judges():
    usage = {"m": TokenUsage(10, 5, 2), "n": TokenUsage(1, 1, 0)}
    grade = Grade(0.8, parts={"fmt": 1.0, "acc": 0.75, "acc.inner": 3.0}, usage=usage)
    response = run_response(parse_grader(MULTI), grade, seconds=0.0)
    assert response["sub_rewards"] == response["metadata"]["scores"] == {"fmt": 1.0, "acc": 0.75}
    tokens = {"prompt_tokens": 10, "total_tokens": 15, "completion_tokens": 5, "cached_tokens": 2}
    assert response["model_grader_token_usage_per_model"]["m"] == tokens
    assert response["metadata"]["token_usage"] == {
        "prompt_tokens": 11,
        "total_tokens": 17,
        "completion_tokens": 6,
        "cached_tokens": 2,
    }
    assert response["metadata"]["sampled_model_name"] == "m"


def test_an_answer_from_the_disk_names_its_model_and_took_nothing():
    response = run_response(parse_grader(CHECK), Grade(1.0, usage={"m": TokenUsage()}), seconds=0.0)
    assert response["metadata"]["sampled_model_name"] == "m"
    assert response["metadata"]["token_usage"] is None
    assert response["model_grader_token_usage_per_model"] == {}


@pytest.mark.parametrize("fault", list(Fault), ids=str)
def test_every_fault_has_its_flag(fault):
    grade = Grade(0.0, Outcome.CRASHED, faults={fault: "why"})
    raised = run_response(parse_grader(CHECK), grade, seconds=0.0)["metadata"]["errors"]
    assert raised.keys() == FLAGS.keys()
    details = {
        "python_grader_server_error": "python_grader_server_error_type",
        "python_grader_runtime_error": "python_grader_runtime_error_details",
        "model_grader_server_error": "model_grader_server_error_details",
    }
    wanted = {**FLAGS, fault: True}
    if fault in details:
        wanted[details[fault]] = "why"
    if fault in (Fault.SAMPLE_PARSE, Fault.TRUNCATED_OBSERVATION, Fault.UNRESPONSIVE_REWARD):
        wanted["other_error"] = True  # these do not say why it crashed
    assert raised == wanted


def test_a_failure_without_a_name_is_an_other_error_and_scores_0():
    response = run_response(parse_grader(CHECK), Grade(None, Outcome.TIMED_OUT, reason="slow"), seconds=0.0)
    assert (response["reward"], response["metadata"]["errors"]) == (0.0, {**FLAGS, "other_error": True})


def test_the_models_fault_is_no_other_error():
    grade = Grade(0.0, Outcome.UNPARSEABLE, faults={Fault.SAMPLE_PARSE: "no JSON"})
    errors = run_response(parse_grader(CHECK), grade, seconds=0.0)["metadata"]["errors"]
    assert errors == {**FLAGS, "sample_parse_error": True}
