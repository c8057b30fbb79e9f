"""The folder of a comparison, and its runs on disk.

    OUT/comparison.json, comparison.md, comparison.png   what came of it
        warm-starts/seed-0/                              a run that ended with its warm start
        runs/LABEL/seed-0/, seed-0.json                  a run folder, and its result when it has finished

A result and a run belong to their settings. Runs of a seed start from one warm start: its folder is copied, so that
they resume behind it with the same bits.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.comparison.entrants import LENGTHS, OWN_SECTIONS, Entry
from graft.config import RunConfig
from graft.config_file import check_config, dump_config
from graft.errors import ConfigError, DataError
from graft.report.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, METRICS_FILE, TREES_FILE, RunFolder
from graft.state.files import disk_errors, sync_folder, write_atomically

BEHIND_THE_WARM_START = (
    *OWN_SECTIONS,
    *(f"training.{name}" for name in (*LENGTHS, "prompts_per_step")),
    "evaluation.every",
    "evaluation.every_generated_tokens",
)
"""Settings that a warm start does not depend on."""


class ComparisonFolder:
    """Where things are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, label: str, seed: int) -> Path:
        """The run folder of an entry."""
        return self.path / "runs" / label / f"seed-{seed}"

    def result(self, label: str, seed: int) -> Path:
        """The file with the result of an entry."""
        return self.path / "runs" / label / f"seed-{seed}.json"

    def warm_start(self, seed: int) -> Path:
        """The run folder that ends with the warm start of a seed."""
        return self.path / "warm-starts" / f"seed-{seed}"

    @contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[int]:
        """Hold the folder for one comparison; gives the descriptor of the lock.

        Child processes inherit the descriptor, and the lock is free when the last of them has gone: a comparison that
        was killed cannot be overtaken by the next while its run still writes.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.path}: another comparison is at work here; waiting for it to end")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def read_result(self, entry: Entry) -> dict[str, Any] | None:
        """The stored result of an entry; None where there is none yet.

        Raises:
            ConfigError: it belongs to other settings.
            DataError: it is damaged.
        """
        path = self.result(entry.label, entry.seed)
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            former = {**stored["settings"], "run": entry.label}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a result of a comparison ({error}). Remove it.") from None
        # checked anew, so that a setting that did not exist then has its default
        settings = comparable(check_config(former, where=str(path)))
        self._refuse_others(settings, comparable(entry.config), self.run(entry.label, entry.seed).parent)
        return stored

    def write_result(self, entry: Entry, result: Mapping[str, Any]) -> dict[str, Any]:
        """Store what a finished run came to, with the settings that it belongs to."""
        stored = {**result, "settings": comparable(entry.config)}
        write_atomically(self.result(entry.label, entry.seed), json.dumps(stored, indent=1) + "\n")
        return stored

    def refuse_changed(self, entry: Entry) -> None:
        """Check that what there is of an entry, and of its warm start, was made with its settings.

        Raises:
            ConfigError: names the settings that differ.
        """
        run, warm = self.run(entry.label, entry.seed), self.warm_start(entry.seed)
        self.read_result(entry)
        if run.exists():
            self._refuse_others(_settings_of(run), comparable(entry.config), run.parent)
        if entry.config.warm_start is not None and warm.exists():
            former, wanted = (
                _without(s, BEHIND_THE_WARM_START) for s in (_settings_of(warm), comparable(entry.config))
            )
            self._refuse_others(former, wanted, warm)

    def _refuse_others(self, former: Mapping[str, Any], wanted: Mapping[str, Any], what: Path) -> None:
        old, new = dict(_flat(former)), dict(_flat(wanted))
        changed = [
            f"{key} was {old.get(key, 'not set')!r} and is {new.get(key, 'not set')!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise ConfigError(
                f"{what}: made with other settings: {'; '.join(changed[:5])}. Give another --out, or remove {what} to "
                "make it anew."
            )


def comparable(config: RunConfig) -> dict[str, Any]:
    """A run's settings without its folder and that of its settings file: a comparison may move."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in ("run", "base")}


def make_run(path: Path, config: RunConfig, warm_start: Path | None) -> None:
    """Make the folder of a run that `graft resume` then goes on with: whole or not at all.

    Args:
        path: the run folder; must not exist.
        config: its settings.
        warm_start: folder of a run that ended with its warm start: the new run is that one from then on. Its
            checkpoint's files never change, so both folders share them.

    Raises:
        ResourceError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".making-{path.name}")
    shutil.rmtree(making, ignore_errors=True)
    with disk_errors(str(path)):
        making.mkdir()
        if warm_start is not None:
            for name in (METRICS_FILE, TREES_FILE):
                if (warm_start / name).exists():
                    shutil.copyfile(warm_start / name, making / name)
            shutil.copytree(warm_start / CHECKPOINTS_FOLDER, making / CHECKPOINTS_FOLDER, copy_function=_link)
        write_atomically(making / CONFIG_FILE, dump_config(config))
        making.rename(path)
    sync_folder(path.parent)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _settings_of(run: Path) -> dict[str, Any]:
    data = {**RunFolder.open(run).read_settings(), "run": str(run)}
    return comparable(check_config(data, where=str(run / CONFIG_FILE)))


def _without(settings: Mapping[str, Any], paths: tuple[str, ...], path: str = "") -> dict[str, Any]:
    return {
        key: _without(value, paths, f"{path}{key}.") if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if f"{path}{key}" not in paths
    }


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        elif value is not None:
            yield f"{path}{key}", value
