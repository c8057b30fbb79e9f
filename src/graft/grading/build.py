"""Specifications -> what judges. The only module that knows every kind of grader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.functions import load_function
from graft.errors import GraderError
from graft.grading import own
from graft.grading.code_tests import CodeTestsGrader, RunTests
from graft.grading.endpoint import EndpointGrader
from graft.grading.formula import parse_formula
from graft.grading.function import FunctionGrader
from graft.grading.judge import EMBEDDING_MODEL, cosine, label_model, score_model
from graft.grading.judge_client import JudgeClient
from graft.grading.math_worker import MathWorker
from graft.grading.multi import MultiGrader, by_formula, by_weights, zero_failures
from graft.grading.number import NumberGrader
from graft.grading.observe import Observer, observed_by, schema_problem
from graft.grading.python import PythonGrader, RunGrade
from graft.grading.schema import (
    CodeTests,
    Endpoint,
    Function,
    GraderSpec,
    JsonSchema,
    LabelModel,
    Math,
    Multi,
    Number,
    Python,
    Regex,
    ScoreModel,
    StringCheck,
    TextSimilarity,
    Weighted,
)
from graft.grading.text import load_measure, string_check, text_similarity
from graft.types import Grade, Grader, Sample


@dataclass(frozen=True, slots=True)
class Services:
    """What graders ask for help. Opened by whoever knows the settings."""

    base: Path = Path()
    """Folder that a function's file name starts from."""

    judges: JudgeClient | None = None
    run_grade: RunGrade | None = None
    run_tests: RunTests | None = None
    sandbox_workers: int = 1
    """How many calls the sandbox behind the two runs side by side."""

    calls_at_once: int = 16
    """Samples that are judged side by side where graders wait for a server."""


class BuiltGrader:
    """A grader with what it holds open."""

    def __init__(self, grade: Grader, *, calls_at_once: int, held: ExitStack) -> None:
        self._grade, self._held = grade, held
        self.calls_at_once = calls_at_once
        """How many samples it may be asked about at the same time, by as many threads."""

    def __call__(self, samples: Sequence[Sample]) -> Sequence[Grade]:
        """Grade each sample."""
        return self._grade(samples)

    def close(self) -> None:
        """Close connections and processes."""
        self._held.close()


def build_grader(
    spec: GraderSpec, services: Services, observe: Observer, *, zero: bool = False
) -> BuiltGrader:
    """What judges as a specification says.

    Args:
        spec: of `check.py`.
        services: what it may ask.
        observe: what it sees of a sample.
        zero: whether a failure of ours scores 0, as at OpenAI, instead of having no score.

    Raises:
        GraderError: a library, a judge server or the sandbox that it needs is missing.
        ConfigError: a function cannot be imported.
    """
    held = ExitStack()
    members = spec.graders if isinstance(spec, Multi | Weighted) else {"": spec}
    try:
        built = {key: _build(member, services, observe, held) for key, member in members.items()}
    except BaseException:
        held.close()
        raise
    if zero:
        built = {key: zero_failures(grader) for key, grader in built.items()}
    grade: Grader = built.get("") or MultiGrader(built, _combination(spec))
    if zero and "" not in built:
        grade = zero_failures(grade)
    return BuiltGrader(
        grade, calls_at_once=max(_calls_at_once(member, services) for member in members.values()), held=held
    )


def _calls_at_once(spec: GraderSpec, services: Services) -> int:
    """More than one where others do the work: servers, or the sandbox."""
    if isinstance(spec, ScoreModel | LabelModel | Endpoint) or _embeds(spec):
        return services.calls_at_once
    return services.sandbox_workers if isinstance(spec, Python | CodeTests) else 1


def _build(spec: GraderSpec, services: Services, observe: Observer, held: ExitStack) -> Grader:
    make = _MAKERS[type(spec)]
    return make(spec, services, observe, held)


def _string_check(spec: StringCheck, services: Services, observe: Observer, held: ExitStack) -> Grader:
    return observed_by(observe, string_check(spec))


def _text_similarity(spec: TextSimilarity, services: Services, observe: Observer, held: ExitStack) -> Grader:
    if not _embeds(spec):
        return observed_by(observe, text_similarity(spec, load_measure(spec.evaluation_metric)))
    if services.judges is None or not services.judges.knows(EMBEDDING_MODEL):
        raise GraderError(
            f"grader '{spec.name}': evaluation_metric 'cosine' needs an embedding model, which OpenAI's RFT does not "
            f'have either. Say where one is: [grading.judge.models."{EMBEDDING_MODEL}"] with base_url and model.'
        )
    return observed_by(observe, cosine(spec, services.judges))


def _score_model(spec: ScoreModel, services: Services, observe: Observer, held: ExitStack) -> Grader:
    return observed_by(observe, score_model(spec, _judges(spec, services)))


def _label_model(spec: LabelModel, services: Services, observe: Observer, held: ExitStack) -> Grader:
    return observed_by(observe, label_model(spec, _judges(spec, services)))


def _python(spec: Python, services: Services, observe: Observer, held: ExitStack) -> Grader:
    if services.run_grade is None:
        raise GraderError(f"grader '{spec.name}': python graders need the sandbox, which is not there")
    return PythonGrader(spec, observe, services.run_grade)


def _code_tests(spec: CodeTests, services: Services, observe: Observer, held: ExitStack) -> Grader:
    if services.run_tests is None:
        raise GraderError(f"grader '{spec.name}': code tests need the sandbox, which is not there")
    return CodeTestsGrader(spec, observe, services.run_tests)


def _endpoint(spec: Endpoint, services: Services, observe: Observer, held: ExitStack) -> Grader:
    service = EndpointGrader(spec)
    held.callback(service.close)
    return observed_by(observe, service)


def _number(spec: Number, services: Services, observe: Observer, held: ExitStack) -> Grader:
    return NumberGrader(spec.key)


def _math(spec: Math, services: Services, observe: Observer, held: ExitStack) -> Grader:
    worker = MathWorker()
    held.callback(worker.close)
    return observed_by(observe, own.math(spec, worker))


def _regex(spec: Regex, services: Services, observe: Observer, held: ExitStack) -> Grader:
    return observed_by(observe, own.regex(spec))


def _json_schema(spec: JsonSchema, services: Services, observe: Observer, held: ExitStack) -> Grader:
    problem = schema_problem(spec.schema_)
    if problem is not None:
        raise GraderError(f"grader '{spec.name}': schema is no JSON schema: {problem}")
    return observed_by(observe, own.json_schema(spec))


def _function(spec: Function, services: Services, observe: Observer, held: ExitStack) -> Grader:
    return FunctionGrader(load_function(spec.function, services.base), timeout_s=spec.timeout_s)


_MAKERS: Mapping[type, Callable[[Any, Services, Observer, ExitStack], Grader]] = {
    StringCheck: _string_check,
    TextSimilarity: _text_similarity,
    ScoreModel: _score_model,
    LabelModel: _label_model,
    Python: _python,
    Endpoint: _endpoint,
    Number: _number,
    Math: _math,
    Regex: _regex,
    JsonSchema: _json_schema,
    CodeTests: _code_tests,
    Function: _function,
}


def _combination(spec: GraderSpec) -> Callable[[Mapping[str, float]], float]:
    if isinstance(spec, Weighted):
        return by_weights(spec.weights)
    assert isinstance(spec, Multi)
    return by_formula(parse_formula(spec.calculate_output, list(spec.graders)))


def _judges(spec: ScoreModel | LabelModel, services: Services) -> JudgeClient:
    if services.judges is None:
        raise GraderError(
            f"grader '{spec.name}' asks the model '{spec.model}': say in [grading.judge] where it is reached"
        )
    return services.judges


def _embeds(spec: GraderSpec) -> bool:
    return isinstance(spec, TextSimilarity) and spec.evaluation_metric == "cosine"
