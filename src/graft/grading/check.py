"""Grader objects as people have them -> checked specifications, or every problem with its place.

spec, problems = check_grader(json.load(file))
spec = read_grader(Path("grader.json"))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue]
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from graft.data.sources import BadJsonError, Problem, nearest, parse_json, shown
from graft.errors import GraderError
from graft.grading.formula import NAME, FormulaError, parse_formula
from graft.grading.job import job_settings
from graft.grading.schema import (
    KINDS,
    PARTS,
    AnyGrader,
    Audio,
    GraderSpec,
    InputMessage,
    Multi,
    SamplingParams,
    Weighted,
    type_of,
)

Steps = tuple[str | int, ...]
"""Keys and list positions that lead to a value inside an object."""

_ADAPTER: TypeAdapter[GraderSpec] = TypeAdapter(AnyGrader)
_TYPES = [name for kind in KINDS for name in type_of(kind)]
_PART_TYPES = [name for kind in PARTS for name in type_of(kind)]
_SLIPS = (
    ("(", "JSON has no brackets around text: write one string, its new lines as \\n"),
    ("'", "JSON has double quotes alone"),
    ('"', "two texts side by side, or a comma is missing: write one string, or put the comma"),
    ("T", "true in small letters"),
    ("F", "false in small letters"),
    ("N", "null instead of None"),
    ("#", "no comments: JSON has none"),
    ("/", "no comments: JSON has none"),
)
"""Character at which JSON went wrong -> what to do."""

_WANTED_OBJECT = 'a grader object, e.g. {"type": "string_check", ...}'
_MISSING = Problem("", "$", "nothing", _WANTED_OBJECT)

_WANTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""Finding of pydantic -> what it wants, where its own words are about Python."""


def check_grader(data: Any, *, where: str = "grader") -> tuple[GraderSpec | None, list[Problem]]:
    """Check a grader object against OpenAI's schema, templates and formula included, and graft's own types.

    A list of graders inside `multi` becomes a map: see `_as_map`. Missing names are filled in.

    Args:
        data: the object, as JSON or TOML gives it.
        where: names its origin in the problems.

    Returns:
        The specification, or None with at least one problem.
    """
    if not isinstance(data, Mapping):
        return None, [Problem(where, "$", shown(data), _WANTED_OBJECT)]
    members = data.get("graders")
    if isinstance(members, Mapping) and isinstance(
        members.get("type"), str
    ):  # the type that OpenAI's clients declare
        return None, [
            Problem(where, "$.graders", "one grader", 'an object: key -> grader, e.g. {"first": {...}}')
        ]
    keys: list[str] = []
    if data.get("type") == "multi" and isinstance(members, list):
        keys, problem = _as_map(data, where)
        if problem is not None:
            return None, [problem]
        data = {**data, "graders": dict(zip(keys, members, strict=True))}
    try:
        return _named(_ADAPTER.validate_python(dict(data))), []
    except ValidationError as error:
        return None, [_problem(dict(entry), data, keys, where) for entry in error.errors(include_url=False)]
    except UnicodeEncodeError as error:
        return None, [
            Problem(where, "$", f"half of a character, {error.object[error.start]!a}", "whole ones")
        ]
    except RecursionError:
        return None, [Problem(where, "$", "objects nested too deeply", "fewer levels")]


def parse_grader(data: Any, *, where: str = "grader") -> GraderSpec:
    """The specification of a grader object.

    Raises:
        GraderError: it is none; the message lists every problem.
    """
    spec, problems = check_grader(data, where=where)
    if spec is None:
        raise GraderError("\n".join(str(problem) for problem in problems))
    return spec


def read_grader(path: Path) -> GraderSpec:
    """The specification in a JSON file that holds it, or the body of a job with it.

    Raises:
        GraderError: the file cannot be read, is no JSON, or holds no grader; the message lists every problem with
            its line.
    """
    spec, problems = check_grader_file(path)
    if spec is None:
        raise GraderError("\n".join(str(problem) for problem in problems))
    return spec


def check_grader_file(path: Path) -> tuple[GraderSpec | None, list[Problem]]:
    """`check_grader` of a JSON file, or of the grader in a job's body; the problems name file and line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        return None, [Problem(str(path), "$", f"a file that cannot be read: {error.strerror}", "a JSON file")]
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        data = parse_json(raw)
    except BadJsonError as error:
        return None, [_json_problem(path.name, raw, error)]
    text, inside = raw.decode("utf-8"), ()
    job = job_settings(data)
    if job is not None:
        steps, settings = job
        data, inside = settings.get("grader"), (*steps, "grader")
        if "grader" not in settings:
            return None, [placed(_MISSING, path.name, text, inside)]
    spec, problems = check_grader(data, where=path.name)
    return spec, [placed(problem, path.name, text, inside) for problem in problems]


def dump_grader(spec: GraderSpec) -> dict[str, Any]:
    """The grader object of a specification: a map for `multi`, defaults filled in. Reading it gives it back."""
    return spec.model_dump(mode="json", exclude_none=True)


def placed(problem: Problem, name: str, text: str, inside: Steps = ()) -> Problem:
    """The problem with its line.

    Args:
        problem: with a path inside the object that was checked.
        name: of the file.
        text: of the file, JSON.
        inside: what leads to the object that was checked.
    """
    line = line_of(text, (*inside, *_from_path(problem.path)))
    path = _as_path(inside) + problem.path.removeprefix("$")
    return Problem(f"{name}:{line}", path, problem.got, problem.wants)


def line_of(text: str, steps: Steps) -> int:
    """The line, from 1, on which the value at `steps` begins in a JSON text; of the last step that there is."""
    place = _skip(text, 0)
    for step in steps:
        inside = _entry(text, place, step)
        if inside is None:
            break
        place = inside
    return text.count("\n", 0, place) + 1


def _as_map(data: Mapping[str, Any], where: str) -> tuple[list[str], Problem | None]:
    """Keys for graders given as a list, as one page of OpenAI's reference shows them.

    `<type>_score` where the types differ and the formula uses these; else the members' names, where these can be
    variables, differ and the formula uses them.
    """
    members, formula = data["graders"], data.get("calculate_output")
    if not all(isinstance(member, Mapping) for member in members):
        return [], Problem(where, "$.graders", shown(members), "an object: key -> grader")
    by_type = [f"{member.get('type')}_score" for member in members]
    by_name = [str(member.get("name")) for member in members]
    usable = [
        keys
        for keys in (by_type, by_name)
        if len(set(keys)) == len(keys) and all(NAME.fullmatch(key) for key in keys)
    ]
    for keys in usable:
        try:
            parse_formula(formula if isinstance(formula, str) else "", keys)
        except FormulaError:
            continue
        return keys, None
    if usable:  # the formula is at fault; its own check says how
        return usable[0], None
    repeated = [key for key, count in Counter(by_type).items() if count > 1]
    return [], Problem(
        where,
        "$.graders",
        f"a list in which {', '.join(repeated)} would be ambiguous",
        "an object: key -> grader; the keys are the formula's variables",
    )


def _named(spec: GraderSpec) -> GraderSpec:
    """With a name for everybody: a member's key, the type of the outermost."""
    changes: dict[str, Any] = {} if spec.name else {"name": spec.type}
    if isinstance(spec, Multi | Weighted):
        changes["graders"] = {
            key: member if member.name else member.model_copy(update={"name": key})
            for key, member in spec.graders.items()
        }
    return spec.model_copy(update=changes)


def _problem(entry: dict[str, Any], data: Any, keys: Sequence[str], where: str) -> Problem:
    """One finding of pydantic in our words."""
    steps = _steps(entry, data, keys)
    kind, context = entry["type"], entry.get("ctx", {})
    path = _as_path(steps)
    if kind == "extra_forbidden":
        known = _known_keys(data, steps[:-1], keys)
        return Problem(
            where, path, "a key that this grader does not have", f"none. {nearest(str(steps[-1]), known)}"
        )
    if kind == "missing":
        return Problem(where, path, "nothing", _wanted(entry))
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _unknown_type(entry, steps, where)
    if kind == "value_error":
        got, _, wants = str(context["error"]).rpartition("; want ")
        return Problem(where, path, got or shown(entry["input"]), wants)
    return Problem(where, path, shown(entry["input"]), _wanted(entry))


def _unknown_type(entry: dict[str, Any], steps: Steps, where: str) -> Problem:
    value = entry["input"]
    got = value.get("type") if isinstance(value, Mapping) else value
    in_message = "content" in steps
    known = _PART_TYPES if in_message else _TYPES
    if got in ("multi", "weighted") and steps:
        return Problem(
            where, _as_path(steps), f"a grader of type {got!r} inside another", "none of these inside"
        )
    hint = nearest(got, known) if isinstance(got, str) else f"There are: {', '.join(known)}."
    path = _as_path((*steps, "type") if isinstance(value, Mapping) else steps)
    return Problem(where, path, "nothing" if got is None else shown(got), f"a type. {hint}")


def _wanted(entry: dict[str, Any]) -> str:
    """What pydantic wants, in our words where its own are about Python."""
    kind = entry["type"]
    if kind == "missing":
        return "a value: this key is required"
    if kind in ("too_short", "too_long"):
        bound, count = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        number = entry["ctx"][count]
        return f"at {bound} {number} {'entry' if number == 1 else 'entries'}"
    return _WANTED.get(kind) or str(entry["msg"]).removeprefix("Input should be ")


def _steps(entry: dict[str, Any], data: Any, keys: Sequence[str]) -> Steps:
    """Pydantic's location without the names of union members, list positions for members of a list."""
    steps: list[str | int] = []
    location = entry["loc"]
    tagged_at = -1
    for index, part in enumerate(location):
        last = index == len(location) - 1
        is_grader = not steps or (len(steps) == 2 and steps[0] == "graders")
        if is_grader and tagged_at != len(steps) and isinstance(data, Mapping) and part == data.get("type"):
            tagged_at = len(steps)  # the type comes first, and may be a key's name too
            continue
        inside = (
            part in data if isinstance(data, Mapping) else isinstance(data, list) and isinstance(part, int)
        )
        if inside:
            data = data[part]
        elif not (last and entry["type"] == "missing"):
            continue  # a union member's name
        from_list = len(steps) == 1 and steps[0] == "graders" and part in keys
        steps.append(keys.index(part) if from_list else part)
    return tuple(steps)


def _known_keys(data: Any, steps: Steps, keys: Sequence[str]) -> list[str]:
    """Keys that the object at `steps` may have."""
    for step in steps:
        data = data[keys[step] if keys and isinstance(step, int) and isinstance(data, Mapping) else step]
    kind = data.get("type") if isinstance(data, Mapping) else None
    if steps[-1:] == ("sampling_params",):
        kind = SamplingParams
    elif steps[-1:] == ("input_audio",):
        kind = Audio
    elif len(steps) > 1 and steps[-2] == "input":
        kind = InputMessage
    for known in (InputMessage, SamplingParams, Audio, *PARTS, *KINDS):
        if kind is known or (isinstance(kind, str) and kind in type_of(known)):
            return [field.alias or name for name, field in known.model_fields.items()]
    return []


def _as_path(steps: Steps) -> str:
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


def _json_problem(name: str, raw: bytes, error: BadJsonError) -> Problem:
    if error.position is None:
        return Problem(name, "$", error.got, error.wants)
    text = raw.decode("utf-8")
    position = min(error.position, len(text))
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    at = text[position : position + 1] if text[position:].strip() else ""
    before = text[:position].rstrip()
    if at in ("}", "]") and before.endswith(","):
        advice = "no comma before it: remove the last one"
    elif error.got.startswith("Extra data") and at not in ("#", "/"):
        advice = "one value: put { before it and } behind it" if at == ":" else "one object and no more"
    elif not at:
        advice = "the end of the object: something is not closed"
    else:
        advice = next((what for sign, what in _SLIPS if at == sign), "valid JSON; mend it there")
    excerpt = (
        text.splitlines()[line - 1].strip() if text.splitlines() and line <= len(text.splitlines()) else ""
    )
    return Problem(
        f"{name}:{line}:{column}", "$", f"{shown(at)} in {shown(excerpt)}" if at else "the end", advice
    )


def _from_path(path: str) -> Steps:
    steps: list[str | int] = []
    for part in path.removeprefix("$").replace("[", ".[").split(".")[1:]:
        steps.append(int(part[1:-1]) if part.startswith("[") and part[1:-1].isdigit() else part)
    return tuple(steps)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _entry(text: str, place: int, step: str | int) -> int | None:
    """Where the value under a key or at a position begins, given where its object or list does."""
    opened = "{" if isinstance(step, str) else "["
    if text[place] != opened:
        return None
    decoder = json.JSONDecoder()
    place, index = _skip(text, place + 1), 0
    while text[place] not in "}]":
        key: str | int = index
        if opened == "{":
            key, place = scanstring(text, place + 1, True)
            place = _skip(text, _skip(text, place) + 1)
        if key == step:
            return place
        _, place = decoder.raw_decode(text, place)
        place, index = _skip(text, place), index + 1
        if text[place] == ",":
            place = _skip(text, place + 1)
    return None
