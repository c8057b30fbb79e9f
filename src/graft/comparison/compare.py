"""Carry out a comparison: every run that is still to do, one after the other, each in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.comparison.child import run_in_a_process
from graft.comparison.entrants import Entrant, Entry, entry_of
from graft.comparison.folder import ComparisonFolder, make_run
from graft.config_file import read_settings
from graft.report.comparison import markdown_page, run_result, summarise
from graft.report.metrics import Stage
from graft.report.run_folder import RunFolder, to_plain
from graft.runs import check_grader
from graft.state.files import write_atomically
from graft.version import VERSION

WARM = "held_out_warm"
"""What the summary of a run has once its warm start is measured."""


class RunStoppedError(Exception):
    """A run of the comparison did not come to its end; it has said why itself."""

    def __init__(self, what: str, exit_code: int) -> None:
        super().__init__(what)
        self.exit_code = exit_code


def entries_of(
    config: Path,
    entrants: Sequence[Entrant],
    *,
    seeds: int,
    tokens: int | None,
    out: Path,
    overrides: Sequence[str] = (),
) -> list[Entry]:
    """Everybody's settings for every seed, in the order in which they run: seed after seed.

    Args:
        config: settings file.
        entrants: who takes part.
        seeds: how many; the first is that of the settings.
        tokens: budget of generated tokens of each run; None: that of the settings.
        out: folder of the comparison.
        overrides: `a.b=c`, as after `--set`.

    Raises:
        ConfigError: the settings are refused.
    """
    settings = read_settings(config, overrides)
    first, folder = settings.get("seed", 0), ComparisonFolder(out)
    entries = [
        entry_of(
            settings,
            entrant,
            tokens=tokens,
            seed=seed,
            run=str(folder.run(entrant.label, seed)),
            where=str(config),
        )
        for seed in range(first, first + seeds)
        for entrant in entrants
    ]
    for entry in entries:
        check_grader(entry.config, None)
    return entries


def compare(
    entries: Sequence[Entry],
    out: Path,
    *,
    target: float | None,
    keep_checkpoints: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run what has no result yet and write `comparison.json` and `comparison.md` after each run.

    Args:
        entries: as `entries_of` gives them.
        out: folder of the comparison; what an earlier call left there is gone on with.
        target: held-out accuracy whose price in tokens and seconds is told.
        keep_checkpoints: keep those of runs that have finished; weights and moments take up 12 bytes a parameter.
        say: told of each run that begins.

    Returns:
        What `comparison.json` holds.

    Raises:
        ConfigError: something in the folder was made with other settings.
        RunStoppedError: a run failed or was interrupted. What had finished is kept.
    """
    folder = ComparisonFolder(out)
    results: list[dict[str, Any]] = []
    with folder.locked(say) as lock:
        for entry in entries:
            folder.refuse_changed(entry)
        for number, entry in enumerate(entries, start=1):
            name = f"{entry.label}, seed {entry.seed} (run {number} of {len(entries)})"
            stored = folder.read_result(entry)
            say(f"{name}{': has its result' if stored else ''}")
            results.append(stored or carry_out(folder, entry, lock=lock, say=say))
            if stored is None and not keep_checkpoints:
                shutil.rmtree(folder.run(entry.label, entry.seed) / "checkpoints", ignore_errors=True)
            _write(out, summary_of(entries, results, target=target))
    return summary_of(entries, results, target=target)


def _write(out: Path, comparison: Mapping[str, Any]) -> None:
    write_atomically(out / "comparison.json", json.dumps(to_plain(comparison), indent=1) + "\n")
    write_atomically(out / "comparison.md", markdown_page(comparison))


def carry_out(
    folder: ComparisonFolder, entry: Entry, *, lock: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Bring one run to its end, from wherever it stands, and store its result."""
    run = folder.run(entry.label, entry.seed)
    if not run.exists():
        warm = None if entry.config.warm_start is None else warm_up(folder, entry, lock=lock, say=say)
        make_run(run, entry.config, warm)
    if RunFolder.open(run).read_summary().get("status") != "finished":
        _go(run, Stage.TRAIN, lock, f"{entry.label}, seed {entry.seed}")
    identity = {"label": entry.label, "algorithm": entry.config.algorithm.name, "seed": entry.seed}
    return folder.write_result(entry, {**identity, "version": VERSION, **run_result(RunFolder.open(run))})


def warm_up(folder: ComparisonFolder, entry: Entry, *, lock: int, say: Callable[[str], None]) -> Path:
    """The folder of the seed's warm start, made by whoever comes first."""
    path = folder.warm_start(entry.seed)
    if not path.exists():
        make_run(path, entry.config.model_copy(update={"run": str(path)}), None)
    if WARM not in RunFolder.open(path).read_summary():
        say(f"warm start of seed {entry.seed}, shared by all")
        _go(path, Stage.WARM_START, lock, f"the warm start of seed {entry.seed}")
    return path


def _go(run: Path, until: Stage, lock: int, name: str) -> None:
    code = run_in_a_process(run, until, lock=lock)
    if code:
        raise RunStoppedError(name, code if code > 0 else 128 - code)


def summary_of(
    entries: Sequence[Entry], results: Sequence[Mapping[str, Any]], *, target: float | None
) -> dict[str, Any]:
    """What `comparison.json` holds: a line for each entrant, and every run's result without its settings."""
    budgets = {entry.config.training.generated_tokens for entry in entries} - {None}
    left_out = {entry.label: list(entry.left_out) for entry in entries}
    return {
        "generated_tokens": next(iter(budgets), None),
        "seeds": sorted({entry.seed for entry in entries}),
        "runs_to_do": len(entries) - len(results),
        "target": target,
        "lines": [
            {**line, "left_out": left_out[line["label"]]} for line in summarise(results, target=target)
        ],
        "runs": [{key: value for key, value in result.items() if key != "settings"} for result in results],
    }
