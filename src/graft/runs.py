"""Starting and resuming runs: what `graft train`, `graft resume` and `graft.train` share.

Imports no torch at the top: what can be refused without it is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.config import RunConfig
from graft.config_file import check_config, dump_config
from graft.errors import ConfigError, DivergenceError, GraftError, ResourceError
from graft.interrupt import Interrupt, Interrupted
from graft.report.html import write_report
from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder, refuse_unwritable
from graft.report.tensorboard import TensorBoardWriter
from graft.report.terminal import Terminal, print_before_after
from graft.report.tree_lines import well_formed
from graft.report.trees import before_and_after, telling_pairs
from graft.saved_runs import refuse_taken
from graft.types import Purpose
from graft.version import VERSION

if TYPE_CHECKING:
    from graft.assemble import Parts, Reward
    from graft.loop import Loop

SHOWN_PAIRS = 3
"""Held-out rows printed before and after training."""

STOPPING = (
    "the run stops at the next moment at which nothing is lost, with a checkpoint. Another Ctrl-C or SIGTERM "
    "stops it at once and loses the steps since the last checkpoint."
)
"""Said when a run is asked to stop, which may take as long as the longest of its units of work."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended or was stopped: its folder, what was measured, and the policy as it is."""

    path: Path
    summary: Mapping[str, Any]
    parts: Parts

    def export(self, folder: str | Path, *, merged: bool = True) -> Path:
        """Write the policy for transformers' `from_pretrained` (merged), or its adapter alone for PEFT.

        Raises:
            ModelError: the folder is not empty, or an adapter is asked for and there is none.
        """
        from graft.model import export

        export(self.parts.policy, Path(folder), merged=merged)
        return Path(folder)

    def generate(self, prompts: Sequence[Any], *, seed: int = 0, **sampling: Any) -> list[str]:
        """Let the trained policy answer, one completion a prompt.

            run.generate(["What is 17 + 25?"], top_k=1)      # top_k=1: always the most likely token

        Args:
            prompts: texts, lists of messages, or rows as for training. They are put to the model as training put
                its rows: `data.system` and `data.suffix` are added.
            seed: another seed, other completions.
            **sampling: settings of the `[sampling]` section that shall differ from the run's.

        Raises:
            ConfigError: a sampling setting is unknown or out of range.
            DataError: a prompt cannot be templated or is too long.
            ResourceError: memory ran out.
        """
        from graft.assemble import build_engine, sampling_settings
        from graft.data.chat import prompts_from_rows
        from graft.data.rows import read_rows
        from graft.memory import memory_errors
        from graft.model import plain_state
        from graft.rollout.sampling import stream_key

        if isinstance(prompts, str):
            raise ConfigError(f"Run.generate: prompts: want a list of prompts, e.g. [{prompts[:40]!r}]")
        parts, data = self.parts, self.parts.config.data
        asked = {"sampling": {**parts.config.sampling.model_dump(), **sampling}}
        config = check_config({**parts.config.model_dump(), **asked}, where="Run.generate")
        rows = read_rows(
            [_as_row(prompt, data.prompt_key) for prompt in prompts],
            options={},
            limit=None,
            seed=config.seed,
            prompt_key=data.prompt_key,
            system=data.system,
            suffix=data.suffix,
            base=Path(config.base),
        )
        asked_prompts = prompts_from_rows(rows, parts.encoder, data.max_prompt_tokens)
        engine = parts.engine or build_engine(config.rollout, parts.policy, parts.forward.precision)[0]
        engine.load_weights(plain_state(parts.policy), 0)
        keys = [[stream_key(seed, Purpose.EVALUATION, 0, prompt.row, 0, 0)] for prompt in asked_prompts]
        with memory_errors("sampling", "rollout.slots or sampling.max_new_tokens"):
            grown = engine.grow(
                [prompt.tokens for prompt in asked_prompts], keys, sampling_settings(config.sampling)
            )
        return [parts.encoder.decode(continuation.tokens) for [continuation] in grown]


def _as_row(prompt: Any, prompt_key: str) -> Mapping[str, Any]:
    return prompt if isinstance(prompt, Mapping) else {prompt_key: prompt}


def start_run(
    config: RunConfig,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
) -> Run:
    """Train from the beginning, in a new run folder.

    Raises:
        GraftError: the kind says which part; see `errors.py`. A folder that a run has already is refused at once.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written. Its `run` is the run as it stands.
    """
    refuse_taken(config.run)
    check_grader(config, reward)
    terminal = terminal or Terminal()
    with closing(_assemble(config, rows, reward, terminal)) as parts:
        return _go(parts, RunFolder.create(config.run, dump_config(config)), terminal)


def resume_run(
    path: str | Path,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    reward: Reward | None = None,
    terminal: Terminal | None = None,
    until: Stage = Stage.TRAIN,
) -> Run:
    """Go on with a run from its newest checkpoint; a run without one starts anew in its folder.

    Args:
        path: the run folder.
        rows: the rows in memory that the run began with, if it did.
        reward: the function in memory that the run began with, if it did.
        terminal: where progress is shown.
        until: stop with a checkpoint when this phase has ended; a run with phases to come is then `interrupted`.

    Raises:
        GraftError, Interrupted: as `start_run`.
    """
    folder = RunFolder.open(path)
    refuse_unwritable(folder.path)
    config = check_config(
        {**folder.read_settings(), "run": str(path)}, where=str(folder.path / "config.toml")
    )
    check_grader(config, reward)
    terminal = terminal or Terminal()
    with closing(_assemble(config, rows, reward, terminal)) as parts:
        return _go(parts, folder, terminal, until)


def check_grader(config: RunConfig, reward: Reward | None) -> None:
    """Refuse settings without a reward where the algorithm needs one. Raises ConfigError."""
    if config.grader is None and reward is None and config.algorithm.name != "sft":
        raise ConfigError(
            f"algorithm '{config.algorithm.name}' needs a [grader] section, e.g. type = 'number', key = 'answer' "
            "(or, from Python, reward=function)"
        )


def _assemble(
    config: RunConfig, rows: Sequence[Mapping[str, Any]] | None, reward: Reward | None, terminal: Terminal
) -> Parts:
    from graft.assemble import assemble

    return assemble(config, rows=rows, reward=reward, progress=terminal.say)


def _go(parts: Parts, folder: RunFolder, terminal: Terminal, until: Stage = Stage.TRAIN) -> Run:
    from graft.loop import Loop

    with ExitStack() as stack:
        stack.enter_context(folder)
        stack.enter_context(terminal)
        interrupt = stack.enter_context(Interrupt(terminal.say, meaning=STOPPING))
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
            loop.run(until)
        except Interrupted as stopped:
            loop.save()
            summary = _closing_summary(summary, loop, folder, status="interrupted")
            folder.write_summary(summary)
            write_report(folder.path)
            stopped.run = Run(folder.path, summary, parts)
            stopped.add_note(f"a checkpoint is written; graft.resume({str(folder.path)!r}) goes on")
            raise
        except GraftError as error:
            failed = {**_closing_summary(summary, loop, folder, status="failed"), "error": str(error)}
            with suppress(ResourceError):  # the first error is the one to know of
                folder.write_summary(failed)
            if not isinstance(error, DivergenceError):  # after which an older checkpoint is the better one
                _keep_what_was_done(loop, folder, terminal)
            raise
        status = "finished" if until is Stage.TRAIN else "interrupted"
        summary = _closing_summary(summary, loop, folder, status=status)
        folder.write_summary(summary)
        write_report(folder.path, say=terminal.say)
    evaluations = [r for r in folder.read_metrics() if r["stage"] == Stage.EVALUATION]
    threshold = parts.config.evaluation.threshold
    pairs = telling_pairs(
        before_and_after(well_formed(folder.read_trees(), lambda _: None)), SHOWN_PAIRS, threshold=threshold
    )
    print_before_after(evaluations, pairs, threshold=threshold, console=terminal.console)
    terminal.say(f"report: {folder.path / 'report.html'}")
    return Run(folder.path, summary, parts)


def _keep_what_was_done(loop: Loop, folder: RunFolder, terminal: Terminal) -> None:
    """A checkpoint of a run that stops for an error, if it has made steps and does not stand in the midst of one; and
    in any case how to go on, since the folder is taken now."""
    if loop.state.number and loop.is_whole:
        try:
            loop.save()
        except GraftError as error:
            terminal.say(f"no checkpoint of this moment could be written: {error}")
        else:
            terminal.say(f"a checkpoint is written: graft resume {folder.path} goes on from it")
            return
    steps = loop.checkpoints.steps()
    where = f"from the checkpoint of {steps[-1]} steps" if steps else "from the start"
    terminal.say(f"when the cause is mended, go on {where} with: graft resume {folder.path}")


def _opening_summary(parts: Parts, loop: Loop, former: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "status": "running",
        "version": VERSION,
        "started_at": former.get("started_at", _now()),
        "seed": parts.config.seed,
        "model": parts.config.model.name,
        "algorithm": parts.config.algorithm.name,
        **({} if (steps := loop.phases[-1].steps) is None else {"steps": steps}),
        "training_rows": len(parts.train),
        "held_out_rows": len(parts.held_out),
        "parameters": sum(p.numel() for p in parts.policy.model.parameters()),
        "device": parts.device.type,
        "dtype": parts.fingerprint["precision"],
        **({"engine": parts.fingerprint["engine"]} if parts.engine is not None else {}),
        "threads": parts.fingerprint["threads"],
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
        if "held_out_accuracy" in record and Moment(record["moment"]) in names
    }
    return {
        **summary,
        "status": status,
        "finished_at": _now(),
        "steps_done": loop.state.steps.get(Stage.TRAIN, 0),
        "train_seconds": loop.state.train_seconds,
        "generated_tokens": loop.state.generated_tokens,
        **({"stopped_early": "; ".join(stopped.values())} if (stopped := loop.state.stopped_early) else {}),
        **measured,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
