"""graft's own graders beside OpenAI's: `regex`, `json_schema`, `math`. (`number` and `function` have their modules.)"""

from __future__ import annotations

from graft.errors import DataError
from graft.grading.libraries import import_library
from graft.grading.math_worker import MathWorker
from graft.grading.observe import Observation, read_json, schema_check
from graft.grading.schema import JsonSchema, Math, Regex
from graft.grading.template import parse_template
from graft.grading.text import Judge
from graft.types import Grade, Outcome

REGEX_TIMEOUT_S = 1.0
"""Some patterns take time exponential in the length of the text."""


def regex(spec: Regex) -> Judge:
    """1 if the pattern is found in the text (or matches all of it), else 0."""
    library = import_library("regex", "regex")
    pattern, text = library.compile(spec.pattern), parse_template(spec.input)
    match = pattern.fullmatch if spec.whole else pattern.search

    def judge(seen: Observation) -> Grade:
        try:
            return Grade(float(match(text.render(seen.namespaces), timeout=REGEX_TIMEOUT_S) is not None))
        except TimeoutError:
            reason = f"the pattern {spec.pattern!r} took longer than {REGEX_TIMEOUT_S:g} s"
            return Grade(None, Outcome.TIMED_OUT, reason=reason)

    return judge


def json_schema(spec: JsonSchema) -> Judge:
    """1 if the text is JSON that follows the schema, else 0."""
    check, text = schema_check(spec.schema_), parse_template(spec.input)

    def judge(seen: Observation) -> Grade:
        try:
            value = read_json(text.render(seen.namespaces))
        except ValueError as error:
            return Grade(0.0, Outcome.UNPARSEABLE, reason=str(error))
        problem = check(value)
        return Grade(float(problem is None), reason=problem or "")

    return judge


def math(spec: Math, worker: MathWorker) -> Judge:
    """1 if the last expression of the text means the same as the reference, else 0."""
    text, reference = parse_template(spec.input), parse_template(spec.reference)

    def judge(seen: Observation) -> Grade:
        wanted = reference.render(seen.namespaces)
        verdict = worker.compare(text.render(seen.namespaces), wanted)
        if verdict == "timed out":
            return Grade(None, Outcome.TIMED_OUT, reason=f"comparing with {wanted!r} took too long")
        if verdict == "no reference":
            raise DataError(
                f"grader 'math': the reference {wanted!r} ({spec.reference}) holds no mathematical expression. Mend "
                "the row, or use string_check for answers that are words."
            )
        if verdict == "no answer":
            return Grade(0.0, Outcome.UNPARSEABLE, reason="no mathematical expression in the completion")
        return Grade(float(verdict == "equal"), reason=f"{verdict}, wanted {wanted}")

    return judge
