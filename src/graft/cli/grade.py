"""`graft grade GRADER ROWS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.common import AsJson, Overrides, print_json, say

if TYPE_CHECKING:
    from graft.config import Grading
    from graft.grading.schema import GraderSpec
    from graft.types import Grade, Sample

TEXT_WIDTH = 40
"""Characters of a completion in the table."""


def grade(
    grader: Annotated[
        str,
        typer.Argument(
            metavar="GRADER",
            help="A grader in OpenAI's format or the body of a fine-tuning job (.json), a settings file with a "
            "[grader] section (.toml), or FILE.py:FUNCTION.",
        ),
    ],
    rows: Annotated[
        Path,
        typer.Argument(metavar="ROWS", help="Rows (.jsonl or .csv); all keys go to the grader as `item`."),
    ],
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Completions (.jsonl), a line each: text, or {"output_text": text, "row": n} (rows counted from 0). '
            "Without `row` the lines belong to the rows in order. Default: the rows' own `output_text`.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Grade completions that are there already, as OpenAI's `graders.run` does: failures score 0 and are flagged."""
    from graft.graders import open_grader
    from graft.grading.offline import grade_all

    spec, grading, base = _open(grader, overrides or ())
    given = _samples(rows, samples)
    opened = open_grader(spec, grading, base=base, any_json=True, zero=True)
    try:
        graded = grade_all(opened, given)
    finally:
        opened.close()
    if as_json:
        from graft.grading.response import run_response

        print_json([run_response(spec, one, seconds=seconds) for one, seconds in graded])
        return
    print(_table([one for one, _ in graded], given))
    failed = sum(one.failed for one, _ in graded)
    mean = sum(one.score or 0.0 for one, _ in graded) / len(graded)
    say(f"{len(graded)} samples, mean {mean:.4f}" + (f", {failed} could not be graded" if failed else ""))


def _open(grader: str, overrides: Sequence[str]) -> tuple[GraderSpec, Grading, Path]:
    from graft.config_file import load_config, load_grading
    from graft.errors import ConfigError, GraderError
    from graft.graders import grader_spec
    from graft.validation import check_files

    path = Path(grader)
    if path.suffix.lower() == ".toml":
        config = load_config(path, overrides)
        if config.grader is None:
            raise ConfigError(f"{path}: no [grader] section")
        return grader_spec(config.grader, Path(config.base)), config.grading, Path(config.base)
    grading = load_grading(overrides)
    if path.suffix.lower() == ".json":
        found = check_files([path])
        if found.grader is None or found.problems:
            raise GraderError("\n".join(found.problems))
        declared = found.grading.response_format
        grading = grading if declared is None else grading.model_copy(update={"response_format": declared})
        return found.grader, grading, path.parent
    return grader_spec({"type": "function", "function": grader}, Path()), grading, Path()


def _samples(rows: Path, completions: Path | None) -> list[Sample]:
    from graft.errors import DataError
    from graft.grading.offline import sample_of_text

    items = [dict(value) for _, value in _read(rows)]
    if not items:
        raise DataError(f"{rows}: no rows in it")
    if completions is None:
        texts = [(place, item.get("output_text")) for place, item in enumerate(items)]
        lacking = next((place for place, text in texts if not isinstance(text, str)), None)
        if lacking is not None:
            raise DataError(
                f"{rows}: row {lacking} has no text output_text to grade. Put the completions there, or give "
                "--samples FILE."
            )
    else:
        texts = _completions(completions, len(items))
    return [sample_of_text(str(text), items[place], row=place) for place, text in texts]


def _completions(path: Path, rows: int) -> list[tuple[int, str]]:
    """Row and text of each line."""
    from graft.errors import DataError

    found: list[tuple[int, str]] = []
    lines = _read(path, any_value=True)
    for number, (where, value) in enumerate(lines):
        text = value.get("output_text") if isinstance(value, Mapping) else value
        row = value.get("row", number) if isinstance(value, Mapping) else number
        if not isinstance(text, str):
            raise DataError(f'{where}: got no text; wants "text" or {{"output_text": "text", "row": 0}}')
        if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < rows:
            raise DataError(
                f"{where}: belongs to row {row}; there are {rows} rows, counted from 0. Give `row`, or no more lines "
                "than rows."
            )
        found.append((row, text))
    if not found:
        raise DataError(f"{path}: no completions in it")
    return found


def _read(path: Path, *, any_value: bool = False) -> list[tuple[str, Any]]:
    """Place and value of every line.

    Raises:
        DataError: a line that cannot be read.
    """
    from graft.data.sources import Problem, read_csv, read_jsonl
    from graft.errors import DataError

    reader = read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path, any_value=any_value)
    entries = list(reader)
    problems = [entry for entry in entries if isinstance(entry, Problem)]
    if problems:
        raise DataError("\n".join(str(problem) for problem in problems[:10]))
    return [(entry.where, entry.value) for entry in entries if not isinstance(entry, Problem)]


def _table(grades: Sequence[Grade], samples: Sequence[Sample]) -> str:
    parts = list(dict.fromkeys(name for grade in grades for name in grade.parts))
    header = ["row", "reward", *parts, "flags", "completion", "reason"]
    lines = [header]
    for grade, sample in zip(grades, samples, strict=True):
        lines.append(
            [
                str(sample.prompt.row),
                f"{grade.score or 0.0:.4g}",
                *(f"{grade.parts[name]:.4g}" if name in grade.parts else "" for name in parts),
                ",".join(str(fault) for fault in grade.faults) or ("other_error" if grade.failed else ""),
                _short(sample.text),
                _short(_last_line(grade.reason)),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _last_line(reason: str) -> str:
    """Of a traceback, which says there what went wrong; else all of it."""
    return reason.strip().splitlines()[-1] if reason.startswith("Traceback") else reason


def _short(text: str) -> str:
    from graft.data.sources import printable

    text = " ".join(printable(text).split())
    return text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…"
