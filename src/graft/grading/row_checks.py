"""What a grader needs of the rows, looked up before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graft.data.rows import Row
from graft.data.sources import Problem, nearest, shown
from graft.grading.code_tests import read_tests
from graft.grading.number import as_number
from graft.grading.observe import check_response_format, declared_format
from graft.grading.schema import CodeTests, GraderSpec, LabelModel, Multi, Number, ScoreModel, Weighted
from graft.grading.template import MissingVariableError, Reference, parse_template

NEVER_SAMPLED = {
    "output_tools": "graft samples text only and calls no tools",
    "output_audio": "graft samples text only",
}


def members_of(spec: GraderSpec) -> Sequence[GraderSpec]:
    """The graders that judge: the members, or the grader itself."""
    return list(spec.graders.values()) if isinstance(spec, Multi | Weighted) else [spec]


def references_of(spec: GraderSpec) -> list[Reference]:
    """Every reference in the templates of a grader and its members."""
    return [
        reference
        for member in members_of(spec)
        for text in _templates(member)
        for reference in parse_template(text).references
    ]


def check_rows(
    spec: GraderSpec, rows: Sequence[Row], response_format: Mapping[str, Any] | None = None
) -> Iterator[Problem]:
    """Everything that the grader would miss in rows, one problem for each row and key.

    Args:
        spec: what judges.
        rows: training or held-out rows.
        response_format: of the rows that have none of their own.
    """
    references = list(dict.fromkeys(references_of(spec)))
    for reference in references:
        if reference.namespace == "sample" and reference.steps[:1]:
            reason = NEVER_SAMPLED.get(str(reference.steps[0]))
            if reason is not None:
                yield Problem("grader", "$", f"{{{{{reference}}}}}", f"none of these: {reason}")
    items = [reference for reference in references if reference.namespace == "item"]
    reads_json = any(
        reference.namespace == "sample" and reference.steps[:1] == ("output_json",)
        for reference in references
    )
    numbers = [member for member in members_of(spec) if isinstance(member, Number)]
    tests = [member for member in members_of(spec) if isinstance(member, CodeTests)]
    for row in rows:
        yield from _check_row(row, items, numbers)
        yield from _check_tests(row, tests)
        declared = declared_format(row.item)
        if declared is not None:
            for problem in check_response_format(declared, row.where):
                yield Problem(row.where, f"$.response_format{problem.path[1:]}", problem.got, problem.wants)
        if reads_json and (declared or response_format or {"type": "text"})["type"] == "text":
            wants = "a response_format: the grader reads sample.output_json. Set grading.response_format"
            yield Problem(row.where, "$.response_format", "nothing", wants)


def _check_row(row: Row, references: Sequence[Reference], numbers: Sequence[Number]) -> Iterator[Problem]:
    for reference in references:
        try:
            reference.resolve({"item": row.item})
        except MissingVariableError as error:
            hint = nearest(str(reference.steps[0]), row.item)
            yield Problem(
                row.where, _path(reference), "nothing", f"a value: the grader reads {error}. {hint}"
            )
    for number in numbers:
        if number.key not in row.item:
            wants = f"a number: the grader compares with it. {nearest(number.key, row.item)} Set grader.key"
            yield Problem(row.where, f"$.{number.key}", "nothing", wants)
        elif as_number(row.item[number.key]) is None:
            yield Problem(row.where, f"$.{number.key}", shown(row.item[number.key]), "a number")


def _check_tests(row: Row, members: Sequence[CodeTests]) -> Iterator[Problem]:
    for member in members:
        try:
            read_tests(row.item.get(member.key))
        except ValueError as error:
            got = shown(row.item[member.key]) if member.key in row.item else "nothing"
            yield Problem(row.where, f"$.{member.key}", got, str(error).removeprefix("want "))


def _path(reference: Reference) -> str:
    return "$" + str(reference).removeprefix("item")


def _templates(spec: GraderSpec) -> Iterator[str]:
    if isinstance(spec, ScoreModel | LabelModel):
        for message in spec.input:
            parts = message.content if isinstance(message.content, list) else [message.content]
            for part in parts:
                text = (
                    part if isinstance(part, str) else getattr(part, "text", getattr(part, "image_url", None))
                )
                if text is not None:
                    yield text
        return
    for name in ("input", "reference"):
        text = getattr(spec, name, None)
        if isinstance(text, str):
            yield text
