"""Graders that ask a model: `score_model`, `label_model`, and the `cosine` of two embeddings.

The judge answers with `{"steps": [{"description", "conclusion"}, ...], "result": ...}`, a form that the server
enforces; the prompt describes the rubric alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graft.data.sources import shown
from graft.grading.judge_client import Answer, JudgeClient, clipped, strict_object
from graft.grading.observe import Observation
from graft.grading.schema import (
    AudioPart,
    ImagePart,
    InputMessage,
    LabelModel,
    SamplingParams,
    ScoreModel,
    TextPart,
    TextSimilarity,
)
from graft.grading.template import Template, parse_template
from graft.grading.text import Judge
from graft.types import Fault, Grade, Outcome

EMBEDDING_MODEL = "text-embedding-3-large"
"""The model behind `cosine` at OpenAI; settings say where it, or another in its place, is reached."""

ROLES = {"developer": "system"}
"""Sent under the older name, which all servers know."""


def score_model(spec: ScoreModel, client: JudgeClient) -> Judge:
    """The judge's number, clipped to the range."""
    low, high = spec.range
    wanted = {
        "type": "number",
        "description": f"The score, a number from {low:g} to {high:g}, both included.",
    }
    return _judge(
        spec, client, "float_score_classification", wanted, lambda result: clipped(result, low, high), "a finite number"
    )  # fmt: skip


def label_model(spec: LabelModel, client: JudgeClient) -> Judge:
    """1 if the judge picks a passing label, else 0."""
    wanted = {"type": "string", "enum": list(spec.labels), "description": "The label that fits."}

    def score(result: Any) -> float | None:
        return float(result in spec.passing_labels) if result in spec.labels else None

    return _judge(spec, client, "label_classification", wanted, score, f"one of {', '.join(spec.labels)}")


def _judge(
    spec: ScoreModel | LabelModel,
    client: JudgeClient,
    form_name: str,
    result: Mapping[str, Any],
    score: Callable[[Any], float | None],
    wanted: str,
) -> Judge:
    """Asks for steps and a result.

    Args:
        spec: model, messages, sampling.
        client: knows where the model is reached.
        form_name: name of the answer's form.
        result: JSON schema of the result.
        score: a result's score; None: it has none.
        wanted: what a result should be, for the error.
    """
    messages, sampling = compile_messages(spec.input), _sampling(spec.sampling_params)
    step = strict_object({"description": {"type": "string"}, "conclusion": {"type": "string"}})
    # Steps before the result: the judge reasons first.
    form = strict_object({"steps": {"type": "array", "items": step}, "result": dict(result)})

    def judge(seen: Observation) -> Grade:
        answer = client.ask(
            spec.model, messages(seen.namespaces), schema_name=form_name, schema=form, sampling=sampling
        )
        return _grade(answer, score, wanted)

    return judge


def cosine(spec: TextSimilarity, client: JudgeClient) -> Judge:
    """Cosine of the embeddings of input and reference; a negative one is 0."""
    text, reference = parse_template(spec.input), parse_template(spec.reference)

    def judge(seen: Observation) -> Grade:
        namespaces = seen.namespaces
        pair = [text.render(namespaces), reference.render(namespaces)]
        if not all(pair):  # the rule for empty texts; services refuse them
            return Grade(float(pair[0] == pair[1]))
        answer, vectors = client.embed(EMBEDDING_MODEL, pair)
        if not vectors:
            return _grade(answer, lambda result: None, "")
        left, right = vectors
        if len(left) != len(right):
            details = f"vectors of {len(left)} and {len(right)} numbers"
            return _failed(answer, Fault.MODEL_GRADER_SERVER, details, Outcome.CRASHED)
        norm = math.sqrt(math.fsum(x * x for x in left) * math.fsum(y * y for y in right))
        product = math.fsum(x * y for x, y in zip(left, right, strict=True))
        score = min(1.0, max(0.0, product / norm)) if norm else 0.0
        return Grade(score, usage={answer.model: answer.usage})

    return judge


def compile_messages(input_: Sequence[InputMessage]) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    """A function from namespaces to the messages of a chat completion."""
    compiled = [(ROLES.get(message.role, message.role), _content(message.content)) for message in input_]

    def render(namespaces: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"role": role, "content": content(namespaces)} for role, content in compiled]

    return render


def _content(content: Any) -> Callable[[Mapping[str, Any]], Any]:
    if isinstance(content, str):
        return parse_template(content).render
    parts = [_part(part) for part in (content if isinstance(content, list) else [content])]
    return lambda namespaces: [part(namespaces) for part in parts]


def _part(part: str | TextPart | ImagePart | AudioPart) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    if isinstance(part, AudioPart):
        sound = part.input_audio.model_dump()
        return lambda namespaces: {"type": "input_audio", "input_audio": sound}
    if isinstance(part, ImagePart):
        url, detail = parse_template(part.image_url), part.detail
        return lambda namespaces: {
            "type": "image_url",
            "image_url": {"url": url.render(namespaces), "detail": detail},
        }
    text: Template = parse_template(part if isinstance(part, str) else part.text)
    return lambda namespaces: {"type": "text", "text": text.render(namespaces)}


def _sampling(params: SamplingParams | None) -> dict[str, Any]:
    given = {} if params is None else params.model_dump(exclude_none=True)
    if "max_completions_tokens" in given:  # the odd plural stands in graders alone
        given["max_completion_tokens"] = given.pop("max_completions_tokens")
    return given


def _grade(answer: Answer, score: Callable[[Any], float | None], wanted: str) -> Grade:
    if answer.value is None:
        assert answer.fault is not None
        return _failed(answer, answer.fault, answer.details, answer.outcome)
    result = answer.value.get("result")
    value = score(result)
    if value is None:
        details = f"{answer.model} answered the result {shown(result)}; want {wanted}"
        return _failed(answer, Fault.MODEL_GRADER_PARSE, details, Outcome.CRASHED)
    return Grade(value, reason=_conclusions(answer.value), usage={answer.model: answer.usage})


def _failed(answer: Answer, fault: Fault, details: str, outcome: Outcome) -> Grade:
    return Grade(None, outcome, reason=details, faults={fault: details}, usage={answer.model: answer.usage})


def _conclusions(value: Mapping[str, Any]) -> str:
    steps = value.get("steps")
    found = [
        str(step["conclusion"])
        for step in (steps if isinstance(steps, list) else [])
        if isinstance(step, Mapping) and "conclusion" in step
    ]
    return "; ".join(found)[:500]
