"""A grade on OpenAI's wire: the response of `fine_tuning.alpha.graders.run`, every key present."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.grading.schema import GraderSpec, Multi, Weighted
from graft.types import Fault, Grade, TokenUsage

DETAILED = {
    Fault.PYTHON_GRADER_SERVER: "python_grader_server_error_type",
    Fault.PYTHON_GRADER_RUNTIME: "python_grader_runtime_error_details",
    Fault.MODEL_GRADER_SERVER: "model_grader_server_error_details",
}
"""Flags that have a text beside them."""


def run_response(spec: GraderSpec, grade: Grade, *, seconds: float) -> dict[str, Any]:
    """The response for one sample. What could not be graded has the reward 0 there, and a flag.

    Args:
        spec: the outermost grader.
        grade: of `build_grader(..., zero=True)`.
        seconds: how long grading took.
    """
    is_several = isinstance(spec, Multi | Weighted)
    scores = {key: grade.parts.get(key, 0.0) for key in spec.graders} if is_several else {}
    used = {model: tokens for model, tokens in grade.usage.items() if tokens.total}
    total = sum(used.values(), TokenUsage())
    return {
        "reward": grade.score or 0.0,
        "metadata": {
            "name": spec.name,
            "type": spec.type,
            "errors": error_flags(grade),
            "execution_time": seconds,
            "scores": scores,
            "token_usage": _tokens(total) if used else None,
            "sampled_model_name": next(iter(grade.usage), None),
        },
        "sub_rewards": scores,
        "model_grader_token_usage_per_model": {model: _tokens(tokens) for model, tokens in used.items()},
    }


def error_flags(grade: Grade) -> dict[str, bool | str | None]:
    """OpenAI's 14 keys. A failure that no fault describes is `other_error`."""
    faults: Mapping[Fault, str] = grade.faults
    if grade.failed and not set(faults) - _NOT_FAILURES:
        faults = {**faults, Fault.OTHER: grade.reason}
    flags: dict[str, bool | str | None] = {}
    for fault in Fault:
        flags[str(fault)] = fault in faults
        if fault in DETAILED:
            flags[DETAILED[fault]] = faults.get(fault)
    return flags


_NOT_FAILURES = {Fault.SAMPLE_PARSE, Fault.TRUNCATED_OBSERVATION, Fault.UNRESPONSIVE_REWARD}
"""What is said of the sample, whether or not it could be graded."""


def _tokens(usage: TokenUsage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt,
        "total_tokens": usage.total,
        "completion_tokens": usage.completion,
        "cached_tokens": usage.cached,
    }
