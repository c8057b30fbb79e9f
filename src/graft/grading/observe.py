"""Sample -> what graders see of it: OpenAI's `sample` and `item`, and whether the output has the declared form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.data.sources import BadJsonError, Problem, parse_json, shown
from graft.errors import DataError, GraderError
from graft.grading.libraries import import_library
from graft.grading.template import MissingVariableError
from graft.types import Fault, Grade, Grader, Outcome, Sample, StopReason

FORMAT_TYPES = ("json_schema", "json_object", "text")


@dataclass(frozen=True, slots=True)
class Observation:
    """One sample as graders see it."""

    sample: Mapping[str, Any]
    """OpenAI's `sample`: all keys are there; what does not exist is None or empty."""

    item: Mapping[str, Any]
    """The whole row."""

    faults: Mapping[Fault, str]
    """What can be said before any grader is asked: empty, cut off, not of the declared form."""

    wants_json: bool
    """Whether the output was to be JSON, so that what is missing in it is the model's fault."""

    absent: frozenset[str]
    """Keys of `sample` that hold nothing, since the model gave nothing. A `null` that it wrote is something."""

    @property
    def text(self) -> str:
        """The completion."""
        return self.sample["output_text"]

    @property
    def namespaces(self) -> Mapping[str, Any]:
        """For templates: keys of `sample` that are absent do not exist."""
        return {
            "item": self.item,
            "sample": {key: value for key, value in self.sample.items() if key not in self.absent},
        }


class Observer:
    """Turns samples into observations."""

    def __init__(self, response_format: Mapping[str, Any] | None = None, *, any_json: bool = False) -> None:
        """
        Args:
            response_format: the form that completions shall have, in the style of chat completions; a row's own
                `response_format` comes first.
            any_json: fill `output_json` wherever the completion is JSON, as OpenAI's `graders.run` does.

        Raises:
            DataError: the form is malformed.
        """
        self._format = response_format
        self._any_json = any_json
        self._parsers: dict[str, Callable[[str], Any]] = {}
        if response_format is not None:
            self._parser(response_format, "response_format")

    def __call__(self, sample: Sample) -> Observation:
        """What graders see of a sample.

        Raises:
            DataError: the row's `response_format` is malformed.
        """
        declared = declared_format(sample.prompt.item) or self._format
        faults: dict[Fault, str] = {}
        if not sample.text.strip():
            faults[Fault.UNRESPONSIVE_REWARD] = "the completion is empty"
        if sample.stop is StopReason.LENGTH:
            faults[Fault.TRUNCATED_OBSERVATION] = f"cut off after {sample.tokens} tokens"
        output_json, absent = None, {"output_json", "output_tools", "output_audio"}
        parse = read_json if self._any_json else None
        is_declared = declared is not None and declared["type"] != "text"
        if declared is not None and is_declared:
            parse = self._parser(declared, f"row {sample.prompt.row}: response_format")
        if parse is not None:
            try:
                output_json = parse(sample.text)
                absent.remove("output_json")
            except ValueError as error:
                if is_declared:
                    faults[Fault.SAMPLE_PARSE] = str(error)
        return Observation(
            sample={
                "output_text": sample.text,
                "output_json": output_json,
                "output_tools": [],
                "output_audio": None,
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": sample.text, "refusal": None},
                        "finish_reason": "length" if sample.stop is StopReason.LENGTH else "stop",
                    }
                ],
            },
            item=sample.prompt.item,
            faults=faults,
            wants_json=parse is not None,
            absent=frozenset(absent),
        )

    def _parser(self, declared: Mapping[str, Any], where: str) -> Callable[[str], Any]:
        key = json.dumps(declared, sort_keys=True)
        if key not in self._parsers:
            problems = check_response_format(declared, where)
            if problems:
                raise DataError("\n".join(str(problem) for problem in problems))
            self._parsers[key] = _build_parser(declared)
        return self._parsers[key]


def declared_format(item: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row's `response_format`, if the key holds one: it is no reserved key, and may hold anything else."""
    value = item.get("response_format")
    return value if isinstance(value, Mapping) and value.get("type") in FORMAT_TYPES else None


def check_response_format(declared: Any, where: str) -> list[Problem]:
    """Why a `response_format` cannot be used."""
    if not isinstance(declared, Mapping):
        return [Problem(where, "$", shown(declared), 'an object, e.g. {"type": "json_schema", ...}')]
    if declared.get("type") not in FORMAT_TYPES:
        return [Problem(where, "$.type", shown(declared.get("type")), f"one of {', '.join(FORMAT_TYPES)}")]
    if declared["type"] != "json_schema":
        return []
    inner = declared.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping | bool):
        wants = '{"name": ..., "strict": true, "schema": {...}}'
        return [Problem(where, "$.json_schema", shown(inner), wants)]
    problem = schema_problem(inner["schema"])
    return [] if problem is None else [Problem(where, "$.json_schema.schema", problem, "a JSON schema")]


def schema_problem(schema: Any) -> str | None:
    """Why something is no JSON schema.

    Raises:
        GraderError: the jsonschema library is missing.
    """
    jsonschema = import_library("jsonschema", "JSON schemas")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"{error.json_path}: {error.message}"[:300]
    except (RecursionError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return None


def schema_check(schema: Any) -> Callable[[Any], str | None]:
    """A function that says why a value does not follow a schema; None where it does.

    The schema must have passed `schema_problem`. References lead to nothing outside it: nothing is fetched. The
    function raises GraderError where the schema itself is at fault, whatever the value.
    """
    jsonschema = import_library("jsonschema", "JSON schemas")
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validator = jsonschema.validators.validator_for(schema)(schema, registry=Registry())

    def check(value: Any) -> str | None:
        try:
            error = jsonschema.exceptions.best_match(validator.iter_errors(value))
        except Unresolvable as failed:
            raise GraderError(
                f"the schema cannot be applied: {failed}. Its references must lead to a place inside it"
            ) from None
        except Exception as failed:  # numbers and depths that the library does not master
            return f"the schema cannot be applied to it: {type(failed).__name__}: {failed}"[:300]
        return None if error is None else f"{error.json_path}: {error.message}"[:300]

    return check


def observed_by(observe: Observer, judge: Callable[[Observation], Grade]) -> Grader:
    """A grader that judges observations one by one, and says so where a template leads to nothing."""

    def grade(samples: Sequence[Sample]) -> list[Grade]:
        return [_judge(observe(sample), judge) for sample in samples]

    return grade


def read_json(text: str) -> Any:
    """The JSON value that a completion is.

    Raises:
        ValueError: it is none; says why.
    """
    try:
        return parse_json(text.strip().encode("utf-8", "surrogatepass"))
    except BadJsonError as error:
        raise ValueError(f"the completion is no JSON: {error.got}") from None


def with_faults(grade: Grade, faults: Mapping[Fault, str]) -> Grade:
    """A grade with more to report; what it says itself stands."""
    return replace(grade, faults={**faults, **grade.faults}) if faults else grade


def _judge(seen: Observation, judge: Callable[[Observation], Grade]) -> Grade:
    try:
        grade = judge(seen)
    except MissingVariableError as missing:
        grade = missing_grade(seen, missing)
    return with_faults(grade, seen.faults)


def missing_grade(seen: Observation, missing: MissingVariableError) -> Grade:
    """The model's fault where its output lacks what was declared; else the row's or the grader's, and no score."""
    faults = {Fault.INVALID_VARIABLE: str(missing)}
    if missing.reference.steps[:1] == ("output_json",) and missing.reference.namespace == "sample":
        if seen.wants_json:
            return Grade(0.0, Outcome.UNPARSEABLE, reason=str(missing), faults=faults)
        reason = f"{missing}. sample.output_json needs a response_format"
        return Grade(None, Outcome.CRASHED, reason=reason, faults=faults)
    return Grade(None, Outcome.CRASHED, reason=str(missing), faults=faults)


def _build_parser(declared: Mapping[str, Any]) -> Callable[[str], Any]:
    """Completion -> JSON value of the declared form; raises ValueError."""
    strict = declared["type"] == "json_schema" and declared["json_schema"].get("strict")
    check = schema_check(declared["json_schema"]["schema"]) if strict else None

    def parse(text: str) -> Any:
        value = read_json(text)
        if declared["type"] == "json_object" and not isinstance(value, dict):
            raise ValueError(f"the completion is {shown(value)}, not a JSON object")
        problem = None if check is None else check(value)
        if problem is not None:
            raise ValueError(f"the completion does not follow the schema: {problem}")
        return value

    return parse
