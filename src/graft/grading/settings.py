"""The `[grader]` section of raw settings: checked, and what other sections take from it where they are silent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from graft.grading.check import check_grader, check_grader_file, dump_grader
from graft.grading.job import read_job


def check_section(value: Any) -> Any:
    """The object as `check_grader` understands it, or an error that lists every problem."""
    if isinstance(value, dict) and "file" in value:
        if not isinstance(value["file"], str) or len(value) > 1:
            raise PydanticCustomError(
                "bad_grader", "grader.file: want a file's name, and no other key beside it"
            )
        return value
    spec, problems = check_grader(value)
    if spec is None:
        lines = [f"grader{p.path.removeprefix('$')}: got {p.got}; wants {p.wants}" for p in problems]
        raise PydanticCustomError("bad_grader", "{lines}", {"lines": "\n".join(lines)})
    if _holds_none(value):
        raise PydanticCustomError(
            "bad_grader",
            "grader: got null inside; TOML has none: put the grader into a JSON file, grader.file",
        )
    return dump_grader(spec)


def with_what_the_grader_says(data: dict[str, Any]) -> dict[str, Any]:
    """Raw settings with what they leave out and the grader says.

    `evaluation.threshold` is its `pass_threshold`, and `grading.response_format` that of the job's body in which it
    stands, if `grader.file` names one.
    """
    grader = data.get("grader")
    if not isinstance(grader, Mapping):
        return data
    threshold = grader.get("pass_threshold")
    if isinstance(grader.get("file"), str):
        path = Path(str(data.get("base", "."))) / Path(grader["file"]).expanduser()
        spec, _ = check_grader_file(path)
        threshold = None if spec is None else spec.pass_threshold
        job = read_job(path)
        declared = None if job is None else job[1].get("response_format")
        data = _with_default(data, "grading", "response_format", declared)
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    return _with_default(data, "evaluation", "threshold", threshold) if is_number else data


def _with_default(data: dict[str, Any], section: str, key: str, value: Any) -> dict[str, Any]:
    own = data.get(section, {})
    silent = value is not None and isinstance(own, dict) and key not in own
    return {**data, section: {**own, key: value}} if silent else data


def _holds_none(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(_holds_none(each) for each in inner)
