"""The folder that a run writes and that everything that shows a run reads.

    config.toml     resolved settings
    metrics.jsonl   one record a line: a training step, a warm-start step or an evaluation (`metrics.py`)
    trees.jsonl     one token tree a line, with texts, grades and advantages (`trees.py`)
    summary.json    what the run is and how it ended (`Summary`)
    report.html     the page made from the files above (`html.py`)
    checkpoints/    written by `state/`

Lines are appended whole or not at all: a failed write is taken back, and a line that a killed process left
half-written is ignored by the readers and removed on resuming.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from graft.errors import CheckpointError, ConfigError, DataError
from graft.report.metrics import check_record
from graft.state.files import FULL, disk_errors, write_atomically

METRICS_FILE = "metrics.jsonl"
TREES_FILE = "trees.jsonl"
CONFIG_FILE = "config.toml"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
CHECKPOINTS_FOLDER = "checkpoints"

_APPENDED = (METRICS_FILE, TREES_FILE)
_SIGNS_OF_A_RUN = (CONFIG_FILE, METRICS_FILE, TREES_FILE, SUMMARY_FILE, CHECKPOINTS_FOLDER)
_NOT_FINITE = {"NaN", "Infinity", "-Infinity"}


class Summary(TypedDict, total=False):
    """What `summary.json` may say; readers do without any of it. Written when a run starts and ends."""

    status: str
    """`running`, `finished`, `interrupted` (Ctrl-C, or asked to stop after a phase) or `failed`."""

    error: str
    """`failed`: the message."""

    started_at: str
    """ISO 8601 with time zone."""

    finished_at: str
    """ISO 8601 with time zone."""

    steps: int
    """Training steps that the run is to make."""

    steps_done: int
    """Training steps that it had made when it ended or stopped."""

    training_rows: int
    held_out_rows: int
    parameters: int
    """Weights of the model."""

    device: str
    dtype: str
    engine: str
    """Path of the engine in use: `fast` or `generic`."""

    threads: int
    version: str
    """Of graft."""

    seed: int
    model: str
    algorithm: str
    train_seconds: float
    """Time spent in optimiser steps, resumed parts included."""

    generated_tokens: int
    stopped_early: str
    """Which part of the run ended before its last step, and why."""

    held_out_before: float
    """Accuracy, as `held_out_accuracy` of that moment; so are the next two."""

    held_out_warm: float
    held_out_after: float


class RunFolder:
    """A handle on one run folder. `create` for a new run, `open` for one that is there.

    with RunFolder.create("runs/first", dump_config(config)) as folder:
        folder.append_metrics({"step": 1, "stage": "train", "reward_mean": 0.25})
        offsets = folder.offsets()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, int] = {}

    @classmethod
    def create(cls, path: str | Path, config: str) -> RunFolder:
        """Make the folder and write `config.toml`.

        Args:
            path: the folder; parents are made.
            config: the resolved settings as TOML.

        Raises:
            ConfigError: the folder already holds a run, cannot be made, or cannot be written.
            ResourceError: the disk is full.
        """
        folder = cls(path)
        refuse_unwritable(folder.path)
        found = [name for name in _SIGNS_OF_A_RUN if (folder.path / name).exists()]
        if found:
            raise ConfigError(
                f"{folder.path}: this folder already holds a run ({', '.join(found)}). "
                f"`graft resume {folder.path}` goes on with it; to start a new one, give another `run`."
            )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refusal(folder.path, error) from None
        write_atomically(folder.path / CONFIG_FILE, config)
        with disk_errors(str(folder.path)):
            (folder.path / METRICS_FILE).touch(exist_ok=False)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """A folder that holds a run.

        Raises:
            DataError: it does not.
        """
        folder = cls(path)
        if not os.path.isfile(folder.path / CONFIG_FILE):  # also False where the system refuses the path
            raise DataError(
                f"{folder.path}: not a run folder: it has no {CONFIG_FILE}. Give the `run` of a config."
            )
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Writing

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one record to `metrics.jsonl`. Values that are None are left out.

        Raises:
            ValueError: a name is not declared, see `metrics.check_record`.
            ResourceError: the disk is full; the file is as it was before.
        """
        self._append(METRICS_FILE, check_record(record))

    def append_tree(self, record: Mapping[str, Any]) -> None:
        """Add one record of `trees.tree_record` to `trees.jsonl`.

        Raises:
            ResourceError: the disk is full; the file is as it was before.
        """
        self._append(TREES_FILE, record)

    def sync(self) -> None:
        """Return when all lines so far are on the disk, safe from a power cut."""
        with disk_errors(str(self.path)):
            for descriptor in self._open.values():
                os.fsync(descriptor)

    def offsets(self) -> dict[str, int]:
        """Sizes of the appended files in bytes, made durable first: what `cut_back` takes."""
        self.sync()
        return {name: self._size(name) for name in _APPENDED}

    def cut_back(self, offsets: Mapping[str, int]) -> None:
        """Take back all lines that were written after `offsets` was.

        Raises:
            CheckpointError: the offsets do not name these files, a file is shorter, or an offset is not the
                end of a line. Nothing is cut then.
        """
        if set(offsets) != set(_APPENDED):
            raise CheckpointError(
                f"{self.path}: the checkpoint has offsets of {sorted(offsets)}; want {sorted(_APPENDED)}"
            )
        for name, offset in offsets.items():
            self._check_offset(name, offset)
        self.close()
        for name, offset in offsets.items():
            if self._size(name) > offset:
                with disk_errors(str(self.path / name)), open(self.path / name, "r+b") as file:
                    file.truncate(offset)
                    os.fsync(file.fileno())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json` anew: afterwards it is the new one or, if that failed, still the old one.

        Raises:
            ResourceError: the disk is full.
        """
        write_atomically(self.path / SUMMARY_FILE, json.dumps(to_plain(summary), indent=2) + "\n")

    def close(self) -> None:
        """Close the files. Appending afterwards opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    # Reading

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records of `metrics.jsonl`, in order. Values that were not finite are floats again.

        Raises:
            DataError: a line other than an unfinished last one cannot be read.
        """
        return [
            {name: _from_name(value) for name, value in record.items()} for record in self._read(METRICS_FILE)
        ]

    def read_trees(self) -> Iterator[dict[str, Any]]:
        """The records of `trees.jsonl` one after the other; the file may be larger than memory.

        Raises:
            DataError: a line other than an unfinished last one cannot be read.
        """
        return self._read(TREES_FILE)

    def read_config(self) -> str:
        """The text of `config.toml`, empty if there is none."""
        path = self.path / CONFIG_FILE
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def read_settings(self) -> dict[str, Any]:
        """`config.toml` as nested tables.

        Raises:
            DataError: it is not TOML.
        """
        try:
            return tomllib.loads(self.read_config())
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{self.path / CONFIG_FILE}: not TOML: {error}") from None

    def read_summary(self) -> dict[str, Any]:
        """`summary.json`, empty if there is none.

        Raises:
            DataError: it is not a JSON object.
        """
        path = self.path / SUMMARY_FILE
        return _parse(path.read_bytes(), str(path)) if path.is_file() else {}

    # Inside

    def _size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if path.exists() else 0

    def _check_offset(self, name: str, offset: int) -> None:
        size = self._size(name)
        if offset > size or offset < 0:
            raise CheckpointError(
                f"{self.path / name}: has {size} bytes, but the checkpoint was written at {offset}: "
                "the file was cut or replaced since. Put the file back, or start a new run."
            )
        if offset > 0:
            with open(self.path / name, "rb") as file:
                file.seek(offset - 1)
                if file.read(1) != b"\n":
                    raise CheckpointError(
                        f"{self.path / name}: byte {offset}, where the checkpoint was written, is not "
                        "the end of a line: the file is not the one of this checkpoint."
                    )

    def _descriptor(self, name: str) -> int:
        """The open file, ready to take a whole line at its end."""
        if name not in self._open:
            size = self._size(name)
            if size:
                self._check_ends_with_a_line(name, size)
            self._open[name] = os.open(
                self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        return self._open[name]

    def _check_ends_with_a_line(self, name: str, size: int) -> None:
        with open(self.path / name, "rb") as file:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                raise DataError(
                    f"{self.path / name}: the last line is unfinished, nothing can follow it. "
                    f"`graft resume {self.path}` cuts it off."
                )

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps(to_plain(record), allow_nan=False).encode("ascii") + b"\n"
        with disk_errors(str(self.path / name)):
            descriptor = self._descriptor(name)
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, line)
            except OSError:
                if os.fstat(descriptor).st_size > before:
                    os.ftruncate(descriptor, before)
                raise

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield _parse(line, f"{path}, line {number}")


def refuse_unwritable(path: Path) -> None:
    """Check that a run may write into a folder, which need not be there yet. Leaves nothing behind.

    Raises:
        ConfigError: the system refuses; the message has its reason.
    """
    try:
        place = path
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno not in FULL:  # which whoever writes will say
            raise _refusal(path, error) from None


def _refusal(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: cannot make the run folder, or not write into it: {error.strerror or error}. Give another `run`, "
        "or see that you may write there."
    )


def to_plain(value: Any) -> Any:
    """Values as JSON has them: numpy's become Python's, numbers that are not finite become text.

    Raises:
        TypeError: a value has no JSON form.
    """
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _name_not_finite(value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _name_not_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _from_name(value: Any) -> Any:
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}. The file was damaged after it was written.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: want a JSON object, got {type(record).__name__}")
    return record


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
