"""Where raw rows come from: JSONL and CSV files, reasoning-gym, the hub. What they mean is `rows.py`'s
business.

Each reader is a generator of `RawRow` and `Problem`, lazy, so that a limit stops the reading.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import DataError

DRY_AFTER = 1000
"""A task is called dry after this many draws without a new question, or ten times its distinct questions."""

HUB_OPTIONS = ("name", "split")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as its source gives it, before anybody looked inside."""

    where: str
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used; the parts of one line of an error message."""

    where: str
    """File and line, e.g. `rows.jsonl:12`."""

    path: str
    """JSON path inside the row, e.g. `$.messages[0].role`."""

    got: str
    wants: str
    """What is wanted, and what to do where that does not follow."""

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.path}: got {self.got}; wants {self.wants}")


def read_jsonl(path: Path, *, any_value: bool = False) -> Iterator[RawRow | Problem]:
    """One JSON object a line (or any JSON value), UTF-8 with or without a byte-order mark. Blank lines are skipped.

    Stricter than Python's parser: a key twice in an object, NaN and infinities are problems.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except BadJsonError as error:
                yield Problem(where, "$", error.got, error.wants)
                continue
            if any_value or isinstance(value, dict):
                yield RawRow(where, value)
            else:
                yield Problem(where, "$", shown(value), 'a JSON object, e.g. {"messages": [...]}')


def read_csv(path: Path) -> Iterator[RawRow | Problem]:
    """A header line, then one row a record; quoted fields may span lines. All values are text.

    Raises:
        DataError: there is no such file, it cannot be read, or its header repeats a name or leaves one out.
    """
    with _opened(path) as file:
        text = (line.decode("utf-8") for line in file)
        records = csv.reader(_without_mark(text), strict=True)
        try:
            header = next(records, None)
            if header is None:
                return
            if len(set(header)) < len(header) or not all(name.strip() for name in header):
                raise DataError(
                    f"{path.name}:1: the header {shown(header)} repeats a column name or leaves one empty. "
                    "Give each column a name of its own."
                )
            line = records.line_num + 1
            for record in records:
                where = f"{path.name}:{line}"
                line = records.line_num + 1
                if not record:
                    continue
                if len(record) == len(header):
                    yield RawRow(where, dict(zip(header, record, strict=True)))
                else:
                    yield Problem(
                        where,
                        "$",
                        f"{len(record)} fields",
                        f"{len(header)}, as in the header; quote fields with commas",
                    )
        except csv.Error as error:
            raise DataError(
                f"{path.name}:{records.line_num}: not a CSV file: {error}. Quote or mend the field."
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path.name}:{records.line_num + 1}: not UTF-8: {error.reason}. Save the file as UTF-8."
            ) from None


def draw_gym(name: str, options: Mapping[str, Any], *, rows: int, seed: int) -> Iterator[RawRow]:
    """Draw rows with distinct questions from a reasoning-gym task.

    Row i of a reasoning-gym data set depends on its seed + i alone: nearby seeds share rows, and small tasks
    repeat questions. The seed is therefore hashed, and repeated questions are skipped.

    Args:
        name: of the task, e.g. `"chain_sum"`.
        options: the task's settings, e.g. `{"min_terms": 3}`.
        rows: how many to draw.
        seed: any integer.

    Raises:
        DataError: reasoning-gym is not installed, does not know the task or refuses its settings, or the task
            has fewer distinct questions than `rows`.
    """
    create, names = _reasoning_gym()
    if name not in names:
        raise DataError(f"gym:{name}: reasoning-gym has no such task. {nearest(name, names)}")
    taken = sorted({"seed", "size"} & options.keys())
    if taken:
        raise DataError(
            f"gym:{name}: options.{taken[0]} is set by graft; use data.rows and the run's seed instead."
        )
    start = int.from_bytes(hashlib.blake2b(f"{name}/{seed}".encode(), digest_size=6).digest())
    chunk = max(2 * rows, DRY_AFTER)  # some tasks prepare all rows of a data set at once, so no huge ones
    seen: set[str] = set()
    draws = misses = 0
    while True:
        try:
            data_set = create(name, **{**options, "seed": start + draws, "size": chunk})
        except Exception as error:  # its checks are assertions, type errors and value errors
            raise DataError(
                f"gym:{name}: reasoning-gym refuses the options {dict(options)}: "
                f"{error or type(error).__name__}. See its {name} settings."
            ) from error
        for position in range(chunk):
            try:
                entry = data_set[position]
            except Exception as error:  # options that pass its checks and still allow no puzzle
                raise DataError(
                    f"gym:{name}: reasoning-gym fails to make row {draws} with the options {dict(options)}: "
                    f"{type(error).__name__}: {error}. Change the options."
                ) from error
            question = " ".join(str(entry["question"]).split())
            draws += 1
            misses += 1
            if question not in seen:
                seen.add(question)
                misses = 0
                yield RawRow(f"gym:{name}#{draws - 1}", entry)
            if len(seen) == rows:
                return
            if misses >= max(DRY_AFTER, 10 * len(seen)):
                raise DataError(
                    f"gym:{name} has only {len(seen)} distinct questions with these options ({draws} draws, "
                    f"the last {misses} without a new one); {rows} are wanted. Ask for fewer rows or widen "
                    "the options."
                )


def read_hub(name: str, options: Mapping[str, Any]) -> Iterator[RawRow]:
    """Rows of a data set on the hub (or in a local folder that the `datasets` library can read).

    Args:
        name: e.g. `"openai/gsm8k"`.
        options: `name` (the data set's configuration, e.g. `"main"`) and `split` (default `"train"`).

    Raises:
        DataError: the library is missing, an option is unknown, or the data set cannot be loaded.
    """
    for option in options:
        if option not in HUB_OPTIONS:
            raise DataError(f"hub:{name}: unknown option {option!r}. {nearest(option, HUB_OPTIONS)}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"hub:{name} needs the datasets library: pip install 'graft-rl[hub]'") from None
    split = options.get("split", "train")
    try:
        rows = load_dataset(name, options.get("name"), split=split)
    except Exception as error:  # the library raises many kinds
        raise DataError(
            f"hub:{name}: cannot be loaded (name {options.get('name')!r}, split {split!r}): {error}. "
            "Check the name, the options and the network."
        ) from error
    for index, value in enumerate(rows):
        yield RawRow(f"hub:{name}[{split}]#{index}", dict(value))


class BadJsonError(ValueError):
    """Why bytes are no JSON value: what was found, where, and what is wanted."""

    def __init__(self, got: str, wants: str, *, position: int | None = None) -> None:
        super().__init__(got)
        self.got, self.wants = got, wants
        self.position = position
        """Characters before the place, where it is known."""


def parse_json(text: bytes) -> Any:
    """One JSON value, read more strictly than Python does.

    Raises:
        BadJsonError: with the place, what was found and what is wanted.
    """
    try:
        return json.loads(_decoded(text), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise BadJsonError(
            f"{error.msg} at column {error.colno}", "one JSON object a line", position=error.pos
        ) from None
    except RecursionError:
        raise BadJsonError("objects nested too deeply", "fewer levels") from None
    except BadJsonError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise BadJsonError(str(error), "numbers of fewer digits; use text for longer ones") from None


def shown(value: Any, limit: int = 60) -> str:
    """A value for an error message, as JSON where it is JSON, cut at `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def printable(text: str) -> str:
    """Without lone surrogates, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def nearest(name: str, names: Any) -> str:
    """`Did you mean 'x'?`, or the names there are; for error messages."""
    import difflib

    near = difflib.get_close_matches(name, list(names), n=3)
    return (
        f"Did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"There are: {', '.join(sorted(names)) or 'none'}."
    )


def _decoded(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJsonError(
            f"byte 0x{line[error.start]:02x} at byte {error.start + 1}", "UTF-8 text"
        ) from None
    return text.rstrip("\r\n")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise BadJsonError(f"the key {shown(repeated)} twice in one object", "each key once")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise BadJsonError(name, "finite numbers (JSON has no others); use null or text")


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        near = [other.name for other in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file. {nearest(path.name, near)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


def _reasoning_gym() -> tuple[Any, list[str]]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise DataError("gym: sources need the reasoning-gym library: pip install 'graft-rl[gym]'") from None
    return reasoning_gym.create_dataset, list(DATASETS)
