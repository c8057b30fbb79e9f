"""Run folders as commands see them: whether one is taken, its settings, its weights. Imports no torch at the top."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.config import RunConfig
from graft.config_file import check_config, set_override
from graft.errors import CheckpointError, ConfigError
from graft.report.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    TREES_FILE,
    RunFolder,
    refuse_unwritable,
)

if TYPE_CHECKING:
    from graft.model import Policy

_SIGNS_OF_A_RUN = (METRICS_FILE, TREES_FILE, SUMMARY_FILE, CHECKPOINTS_FOLDER)


def holds_run(path: str | Path) -> bool:
    """Whether a run has written into a folder. A `config.toml` alone is a task and no run."""
    return any((Path(path) / name).exists() for name in _SIGNS_OF_A_RUN)


def refuse_taken(path: str | Path) -> None:
    """Check that a new run may have this folder.

    Raises:
        ConfigError: it holds a run, or a `config.toml` that the run would overwrite; or it cannot be written.
    """
    folder = Path(path)
    refuse_unwritable(folder)
    if holds_run(folder):
        raise ConfigError(
            f"{folder}: this folder already holds a run. `graft resume {folder}` goes on with it; to start "
            "a new one, give another `run` (or, on the command line, --new)."
        )
    if (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"{folder}: there is a {CONFIG_FILE} that the run would overwrite. Give another `run`."
        )


def free_run_folder(path: str | Path) -> str:
    """The path itself if no run has it, else the first free one of `path-2`, `path-3`, ...

    A path that the system refuses counts as free: `refuse_taken` says what is wrong with it.
    """
    number, candidate = 1, Path(path)
    while os.path.exists(candidate) and any(candidate.iterdir() if candidate.is_dir() else [candidate]):
        number += 1
        candidate = Path(f"{path}-{number}")
    return str(candidate)


def read_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings that a run was made with.

    Args:
        path: its folder.
        overrides: `a.b=c`, as after `--set`.

    Raises:
        DataError: the folder is not a run's.
        ConfigError: an override is malformed, or the settings are not of this version.
    """
    folder = RunFolder.open(path)
    data = folder.read_settings()
    for override in overrides:
        set_override(data, override)
    return check_config({**data, "run": str(path)}, where=str(folder.path / CONFIG_FILE))


def load_run_weights(policy: Policy, path: str | Path, step: int | None = None) -> int:
    """Copy the weights of a run's checkpoint into a policy made from the run's settings.

    Nothing in the folder is touched, so the run may still be going on.

    Args:
        policy: gets the weights.
        path: the run's folder.
        step: number of the checkpoint; the newest if not given.

    Returns:
        The number of the checkpoint: optimiser steps, a warm start's included.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it does not fit the policy.
    """
    from graft.state.checkpoint import Checkpoints, load_parameters

    folder = Path(path) / CHECKPOINTS_FOLDER
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=0)
    steps = checkpoints.steps()
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{path}: no checkpoint of step {step}; there are {', '.join(map(str, steps)) or 'none'}"
        )
    found = checkpoints.load_newest() if step is None else checkpoints.load(step)
    if found is None:
        raise CheckpointError(
            f"{path}: the run has no checkpoint yet. It writes one when it ends or is interrupted, and "
            "every `checkpoints.every` steps."
        )
    load_parameters(policy.model, found.weights)
    return found.number
