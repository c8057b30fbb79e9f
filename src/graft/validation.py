"""Checking graders, rows and settings without a model: every problem with file, line, path and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graft.config import Grading, RunConfig
from graft.config_file import load_config
from graft.data.rows import Row, check_row, read_rows, row_of
from graft.data.sources import Problem, RawRow, read_csv, read_jsonl
from graft.data.split import refuse_overlap, split_rows
from graft.errors import ConfigError, DataError, GraderError, GraftError
from graft.graders import grader_spec, open_grader
from graft.grading.build import BuiltGrader
from graft.grading.check import check_grader_file, placed
from graft.grading.job import read_job
from graft.grading.observe import check_response_format
from graft.grading.offline import grade_all, sample_of_text
from graft.grading.row_checks import check_rows
from graft.grading.schema import GraderSpec
from graft.grading.template import as_text
from graft.named_functions import refuse_functions
from graft.score_notes import score_notes
from graft.types import Grade, Sample, StopReason

FEWEST_ROWS = 10
"""OpenAI's service wants so many in a file."""


@dataclass(slots=True)
class Found:
    """What the files hold, and what is wrong with it."""

    grader: GraderSpec | None = None
    grader_where: str = ""
    grading: Grading = field(default_factory=Grading)
    base: Path = Path()
    rows: list[Row] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """File -> what it was taken for."""

    settings: list[RunConfig] = field(default_factory=list)
    """Those whose own rows are still to be read."""

    settings_problems: list[str] = field(default_factory=list)
    grader_problems: list[str] = field(default_factory=list)
    row_problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Worth knowing, and no reason to refuse."""

    @property
    def problems(self) -> list[str]:
        """All of them."""
        return [*self.settings_problems, *self.grader_problems, *self.row_problems]


@dataclass(frozen=True, slots=True)
class Trial:
    """What the grader gives to one answer of every row."""

    kind: str
    """`reference`, `empty`, `wrong` (another row's reference) or `truncated` (its first half, cut off)."""

    scores: Sequence[float]
    """Of the answers that have one."""

    failed: int

    @property
    def mean(self) -> float | None:
        """None where no answer has a score."""
        return sum(self.scores) / len(self.scores) if self.scores else None


def check_files(paths: Sequence[Path], *, prompt_key: str = "prompt") -> Found:
    """Check files by themselves, then rows against the grader.

    Args:
        paths: `.json` (a grader, or the body of a fine-tuning job), `.jsonl` and `.csv` (rows), `.toml` (settings:
            their own grader, functions and rows).
        prompt_key: column with the prompt of rows without `messages`.
    """
    found = Found()
    for path in paths:
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            found.row_problems.append(f"{path}: got no known kind; wants .json, .jsonl, .csv or .toml")
            continue
        reader(path, found, prompt_key)
    for config in found.settings:
        _read_rows_of_settings(config, found)
    if found.grader is not None and found.rows:
        problems = check_rows(found.grader, found.rows, found.grading.response_format)
        found.row_problems += [str(problem) for problem in problems]
    return found


def try_out(found: Found, key: str) -> list[Trial]:
    """Let the grader judge each row's reference, and answers that should get less.

    Args:
        found: files without problems, a grader and rows among them.
        key: of the row that holds the reference: text, or a value that is written as templates write it.

    A reference without full marks is a problem, added to `found`: full marks are the best score that any reference
    gets, and 1 at least for graders that count from 0 to 1.

    Raises:
        ConfigError: there is no grader, or there are no rows.
        GraftError: the grader cannot be opened.
    """
    if found.grader is None or not found.rows:
        lacking = (
            "rows, which no file holds or names" if found.grader else "a grader, which no file holds or names"
        )
        raise ConfigError(
            f"--reference-key needs {lacking}: give a grader and rows, or settings that name both."
        )
    missing = [row.where for row in found.rows if key not in row.item]
    if missing:
        raise DataError(f"{missing[0]}: no key {key!r} for --reference-key ({len(missing)} rows lack it)")
    references = [as_text(row.item[key]) for row in found.rows]
    grader = open_grader(found.grader, found.grading, base=found.base)
    try:
        trials = [
            _trial(kind, answers, found, grader) for kind, answers in _answers(references, found.rows).items()
        ]
    finally:
        grader.close()
    return trials


def _answers(references: Sequence[str], rows: Sequence[Row]) -> dict[str, list[Sample]]:
    def samples(texts: Sequence[str], stop: StopReason = StopReason.EOS) -> list[Sample]:
        return [
            sample_of_text(t, row.item, row=row.index, stop=stop) for t, row in zip(texts, rows, strict=True)
        ]

    shifted = [_another(references, place) for place in range(len(references))]
    return {
        "reference": samples(references),
        "empty": samples([""] * len(references)),
        "wrong": samples(shifted),
        "truncated": samples([text[: len(text) // 2] for text in references], StopReason.LENGTH),
    }


def _another(references: Sequence[str], place: int) -> str:
    """The next reference that differs; text of our own where all are the same."""
    own = references[place]
    ahead = (references[(place + step) % len(references)] for step in range(1, len(references)))
    return next((text for text in ahead if text != own), f"not {own}")


def _trial(kind: str, samples: Sequence[Sample], found: Found, grader: BuiltGrader) -> Trial:
    graded = [grade for grade, _ in grade_all(grader, samples)]
    if kind == "reference":
        best = max((grade.score for grade in graded if grade.score is not None), default=1.0)
        for row, grade in zip(found.rows, graded, strict=True):
            problem = _short_of(grade, max(1.0, best))
            if problem is not None:
                found.row_problems.append(
                    f"{row.where}: $: got {problem}; wants full marks for the reference"
                )
    scores = [grade.score for grade in graded if grade.score is not None]
    return Trial(kind, scores, sum(grade.failed for grade in graded))


def _short_of(grade: Grade, full: float) -> str | None:
    if grade.failed:
        return f"no grade ({grade.outcome}): {grade.reason}"
    assert grade.score is not None
    if grade.score >= full - 1e-9:
        return None
    return f"the score {grade.score:g} of {full:g}" + (f" ({grade.reason})" if grade.reason else "")


def _read_json(path: Path, found: Found, prompt_key: str) -> None:
    job = read_job(path)
    found.files[str(path)] = "a grader" if job is None else "a job's body"
    spec, problems = check_grader_file(path)
    if job is not None:
        problems += _check_format(path, *job, found)
    found.grader_problems += [str(problem) for problem in problems]
    _take_grader(spec, path.name, found)
    if spec is not None and job is None:
        found.base = path.parent


def _check_format(
    path: Path, steps: tuple[str, ...], settings: Mapping[str, Any], found: Found
) -> list[Problem]:
    """Of the completions, which a job declares beside its grader."""
    declared = settings.get("response_format")
    if declared is None:
        return []
    text = path.read_text(encoding="utf-8-sig")
    refused = check_response_format(declared, path.name)
    if not refused:
        found.grading = found.grading.model_copy(update={"response_format": declared})
    return [placed(problem, path.name, text, (*steps, "response_format")) for problem in refused]


def _read_rows(
    path: Path, found: Found, prompt_key: str, *, limit: int | None = None, of_settings: bool = False
) -> None:
    """The rows of a file: the first `limit` of them, and without notes where settings name it."""
    found.files[str(path)] = "rows"
    read = read_jsonl if path.suffix.lower() == ".jsonl" else read_csv
    known = {row.key: row.where for row in found.rows}
    count, usable = 0, 0
    try:
        for raw in read(path):
            count += 1
            problems = [raw] if isinstance(raw, Problem) else list(check_row(raw, prompt_key))
            found.row_problems += [str(problem) for problem in problems]
            if isinstance(raw, RawRow) and not problems:
                row = row_of(len(found.rows), raw, prompt_key)
                found.rows.append(row)
                usable += 1
                if of_settings and usable == limit:
                    break
                if not of_settings and row.key in known and not known[row.key].startswith(f"{path.name}:"):
                    found.notes.append(f"{row.where}: the same question as {known[row.key]}")
    except DataError as error:
        found.row_problems.append(str(error))
        return
    if count == 0:
        found.row_problems.append(f"{path.name}: no rows in it; wants at least one")
    elif count < FEWEST_ROWS and not of_settings:
        found.notes.append(f"{path.name}: {count} rows; OpenAI's service wanted {FEWEST_ROWS} at least")


def _read_settings(path: Path, found: Found, prompt_key: str) -> None:
    found.files[str(path)] = "settings"
    try:
        config = load_config(path)
    except GraftError as error:
        found.settings_problems += str(error).splitlines()
        return
    found.grading, found.base = config.grading, Path(config.base)
    found.settings.append(config)
    try:
        if config.grader is not None:
            _take_grader(grader_spec(config.grader, found.base), path.name, found)
        found.notes += [f"{path.name}: {note}" for note in score_notes(config)]
        refuse_functions(config)
    except GraderError as error:
        found.grader_problems += str(error).splitlines()
    except ConfigError as error:
        found.settings_problems += [f"{path.name}: {line}" for line in str(error).splitlines()]


def _read_rows_of_settings(config: RunConfig, found: Found) -> None:
    """As a run reads them, but all problems of a file are listed. The hub is not asked."""
    data, base = config.data, Path(config.base)
    if data.source is None:
        found.notes.append("the settings name no data.source: rows would have to come from Python")
    given = {Path(name).resolve() for name in found.files}
    parts: list[list[Row]] = []
    for source, limit in ((data.source, data.rows), (data.held_out_source, None)):
        if source is None:
            continue
        if source.startswith("hub:"):
            found.notes.append(f"{source}: not read here")
            continue
        is_file = not source.startswith("gym:")
        path = (base / Path(source).expanduser()).resolve()
        if is_file and path in given:
            continue
        before = len(found.rows)
        if is_file and not data.options and path.suffix.lower() in (".jsonl", ".csv"):
            _read_rows(path, found, data.prompt_key, limit=limit, of_settings=True)
        else:
            _read_other_rows(config, source, limit, found)
        parts.append(found.rows[before:])
    if found.row_problems or found.settings_problems:
        return
    try:
        if len(parts) == 2:
            refuse_overlap(*parts)
        elif parts and data.held_out:
            split_rows(parts[0], data.held_out, seed=config.seed)
    except DataError as error:
        found.row_problems += str(error).splitlines()


def _read_other_rows(config: RunConfig, source: str, limit: int | None, found: Found) -> None:
    """Of `gym:NAME`; and of what is no source, to say why."""
    data = config.data
    try:
        rows = read_rows(source, options=data.options, limit=limit, seed=config.seed, base=Path(config.base))
    except ConfigError as error:
        found.settings_problems += str(error).splitlines()
    except GraftError as error:
        found.row_problems += str(error).splitlines()
    else:
        found.files[source] = "rows"
        found.rows += [replace(row, index=len(found.rows) + place) for place, row in enumerate(rows)]


def _take_grader(spec: GraderSpec | None, where: str, found: Found) -> None:
    if spec is None:
        return
    if found.grader is not None:
        found.notes.append(
            f"{where}: a second grader; rows are checked against the one in {found.grader_where}"
        )
        return
    found.grader, found.grader_where = spec, where


_READERS = {".json": _read_json, ".jsonl": _read_rows, ".csv": _read_rows, ".toml": _read_settings}


def error_of(found: Found) -> type[GraftError] | None:
    """Which kind of error the problems are, for the exit code."""
    if found.settings_problems:
        return ConfigError
    if found.grader_problems:
        return GraderError
    return DataError if found.row_problems else None


def lines_of(trials: Sequence[Trial]) -> Iterator[str]:
    """The trials for people."""
    for trial in trials:
        if trial.mean is None:
            line = "no score"
        else:
            line = f"{trial.mean:.3f} on average, from {min(trial.scores):.3g} to {max(trial.scores):.3g}"
        failed = f", {trial.failed} could not be graded" if trial.failed else ""
        yield f"{trial.kind:<10} {line}{failed}"
