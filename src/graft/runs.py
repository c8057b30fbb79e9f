"""Starting and resuming runs: what `graft train`, `graft resume` and `graft.train` share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from graft.assemble import Parts, Reward, assemble
from graft.config import RunConfig
from graft.config_file import check_config, dump_config
from graft.errors import ConfigError, GraftError
from graft.interrupt import Interrupt, Interrupted
from graft.loop import Loop, sampling_settings
from graft.model import export
from graft.report.html import write_report
from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder
from graft.report.tensorboard import TensorBoardWriter
from graft.report.terminal import Terminal, print_before_after
from graft.report.trees import before_and_after, telling_pairs
from graft.version import VERSION

SHOWN_PAIRS = 3
"""Held-out rows printed before and after training."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended: its folder, what was measured, and the trained policy."""

    path: Path
    summary: Mapping[str, Any]
    parts: Parts

    def export(self, folder: str | Path, *, merged: bool = True) -> Path:
        """Write the policy for transformers' `from_pretrained` (merged), or its adapter alone for PEFT.

        Raises:
            ModelError: the folder is not empty, or an adapter is asked for and there is none.
        """
        export(self.parts.policy, Path(folder), merged=merged)
        return Path(folder)


def start_run(
    config: RunConfig,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
) -> Run:
    """Train from the beginning, in a new run folder.

    Raises:
        GraftError: the kind says which part; see `errors.py`.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    check_grader(config, reward)
    check_sampling(config)
    parts = assemble(config, rows=rows, reward=reward)
    folder = RunFolder.create(config.run, dump_config(config))
    return _go(parts, folder, terminal or Terminal())


def resume_run(
    path: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
) -> Run:
    """Go on with a run from its newest checkpoint; a run without one starts anew in its folder.

    Args:
        path: the run folder.
        rows: the rows in memory that the run began with, if it did.
        reward: the function in memory that the run began with, if it did.
        terminal: where progress is shown.

    Raises:
        GraftError, Interrupted: as `start_run`.
    """
    folder = RunFolder.open(path)
    config = check_config(
        {**folder.read_settings(), "run": str(path)}, where=str(folder.path / "config.toml")
    )
    check_grader(config, reward)
    check_sampling(config)
    parts = assemble(config, rows=rows, reward=reward)
    return _go(parts, folder, terminal or Terminal())


def check_grader(config: RunConfig, reward: Reward | None) -> None:
    """Refuse settings without a reward where the algorithm needs one. Raises ConfigError."""
    if config.grader is None and reward is None and config.algorithm.name != "sft":
        raise ConfigError(
            f"algorithm '{config.algorithm.name}' needs a [grader] section, e.g. type = 'number', key = 'answer' "
            "(or, from Python, reward=function)"
        )


def check_sampling(config: RunConfig) -> None:
    """Refuse to train on truncated sampling. Raises ConfigError."""
    if config.algorithm.name != "sft" and sampling_settings(config.sampling).truncated:
        raise ConfigError(
            "sampling.top_k, top_p and min_p cannot be used in training yet: the ratio needs the set of tokens that "
            "were kept at each position, which is not recorded. Leave them out; `graft eval` takes them."
        )


def _go(parts: Parts, folder: RunFolder, terminal: Terminal) -> Run:
    with ExitStack() as stack:
        stack.enter_context(folder)
        stack.enter_context(terminal)
        stack.enter_context(closing(parts))
        interrupt = stack.enter_context(Interrupt())
        loop = Loop(parts, folder, terminal, interrupt)
        summary = _opening_summary(parts, loop, former=folder.read_summary())
        for note in parts.notes:
            terminal.say(note)
        terminal.describe(
            device=summary["device"],
            dtype=summary["dtype"],
            engine=summary.get("engine", "no"),
            threads=summary["threads"],
        )
        loop.restore()
        if parts.config.report.tensorboard:
            writer = TensorBoardWriter(folder.path)
            stack.callback(writer.close)
            loop.watchers.append(writer.write)
        folder.write_summary(summary)
        try:
            loop.run()
        except Interrupted:
            loop.save()
            folder.write_summary(_closing_summary(summary, loop, folder, status="interrupted"))
            write_report(folder.path)
            raise
        except GraftError as error:
            folder.write_summary(
                {**_closing_summary(summary, loop, folder, status="failed"), "error": str(error)}
            )
            raise
        summary = _closing_summary(summary, loop, folder, status="finished")
        folder.write_summary(summary)
        write_report(folder.path)
    evaluations = [r for r in folder.read_metrics() if r["stage"] == Stage.EVALUATION]
    threshold = parts.config.evaluation.threshold
    pairs = telling_pairs(before_and_after(folder.read_trees()), SHOWN_PAIRS, threshold=threshold)
    print_before_after(evaluations, pairs, threshold=threshold)
    print(f"report: {folder.path / 'report.html'}", file=sys.stderr)  # noqa: T201
    return Run(folder.path, summary, parts)


def _opening_summary(parts: Parts, loop: Loop, former: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "status": "running",
        "version": VERSION,
        "started_at": former.get("started_at", _now()),
        "seed": parts.config.seed,
        "model": parts.config.model.name,
        "algorithm": parts.config.algorithm.name,
        "steps": loop.phases[-1].steps,
        "training_rows": len(parts.train),
        "held_out_rows": len(parts.held_out),
        "parameters": sum(p.numel() for p in parts.policy.model.parameters()),
        "device": parts.device.type,
        "dtype": parts.fingerprint["precision"],
        **({"engine": parts.fingerprint["engine"]} if parts.engine is not None else {}),
        "threads": torch.get_num_threads(),
    }


def _closing_summary(
    summary: Mapping[str, Any], loop: Loop, folder: RunFolder, *, status: str
) -> dict[str, Any]:
    names = {
        Moment.BEFORE: "held_out_before",
        Moment.AFTER_WARM_START: "held_out_warm",
        Moment.AFTER: "held_out_after",
    }
    measured = {
        names[Moment(record["moment"])]: record["held_out_accuracy"]
        for record in folder.read_metrics()
        if record["stage"] == Stage.EVALUATION and Moment(record["moment"]) in names
    }
    return {
        **summary,
        "status": status,
        "finished_at": _now(),
        "train_seconds": loop.state.train_seconds,
        "generated_tokens": loop.state.generated_tokens,
        **measured,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
