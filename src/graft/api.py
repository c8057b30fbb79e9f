"""The Python interface: `graft.train`, `graft.evaluate` and `graft.resume`.

    import graft

    rows = [{"prompt": "What is 17 + 25?", "answer": 42}, ...]
    run = graft.train("smollm2-135m-instruct", rows, lambda completion, item: str(item["answer"]) in completion)

Settings are those of the settings file, checked by the same tree with the same messages. Imports no torch at
the top, so that `import graft` and a refused setting are quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.config import RunConfig
from graft.config_file import check_config
from graft.errors import ConfigError
from graft.saved_runs import free_run_folder, holds_run, load_run_weights, read_run_config

if TYPE_CHECKING:
    from graft.assemble import Parts
    from graft.evaluation import Evaluation
    from graft.report.terminal import Terminal
    from graft.runs import Run
    from graft.types import Prompt

Rows = str | Path | Iterable[Mapping[str, Any]]
"""Rows in memory, `FILE.jsonl`, `FILE.csv`, `gym:NAME` or `hub:NAME`."""

Reward = Callable[..., Any] | str | Mapping[str, Any]
"""A function `(completion, item)` or `(completion, item, sample)` that returns a number; `"number"`;
`"file.py:function"`; `"grader.json"`, a grader of OpenAI's; or the settings of the `[grader]` section."""

NEW_RUN = "runs/run"
"""Where runs go that are given no folder: `runs/run`, `runs/run-2`, ..."""

LENGTHS = {"steps", "epochs", "generated_tokens"}
"""Settings that say how long a run trains."""


def train(
    model: str | Path,
    rows: Rows,
    reward: Reward | None = None,
    *,
    algorithm: str | Mapping[str, Any] = "grpo",
    run: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Fine-tune a model and return the finished run.

    Args:
        model: embedded name, model folder, `.gguf` file or hub id.
        rows: dicts with `prompt` or `messages` and any other keys, or the name of a source.
        reward: what judges a completion; see `Reward`. Only supervised training goes without.
        algorithm: its name, or the settings of the `[algorithm]` section.
        run: folder that the run writes, which no run may have yet. Default: a new one, `runs/run-<number>`.
        quiet: print nothing. Everything is in the run folder all the same.
        **settings: any others, as tables (`training={"steps": 30}`) or with double underscores
            (`training__steps=30`). Without a length (`training.steps`, `epochs` or `generated_tokens`) it is
                one epoch.

    Raises:
        GraftError: its kind says what is wrong; see `graft/errors.py`.
        Interrupted: Ctrl-C or SIGTERM; `graft.resume` goes on from the checkpoint that was written. The exception's
            `run` is the run as it stands.
    """
    source, in_memory = _split_rows(rows)
    function, grader = _split_reward(reward)
    data = _nested(
        {
            "model__name": str(model),
            **source,
            **grader,
            **({"algorithm__name": algorithm} if isinstance(algorithm, str) else {"algorithm": algorithm}),
        },
        settings,
    )
    data.setdefault("training", {})
    if isinstance(data["training"], dict) and not LENGTHS & set(data["training"]):
        data["training"]["epochs"] = 1
    config = _check(data, run=free_run_folder(NEW_RUN) if run is None else str(run), where="graft.train")
    from graft.runs import start_run

    return start_run(config, rows=in_memory, reward=function, terminal=_terminal(quiet=quiet))


def resume(
    run: str | Path,
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    reward: Callable[..., Any] | None = None,
    quiet: bool = False,
) -> Run:
    """Go on with an interrupted run from its newest checkpoint, to the result that it would have had.

    Args:
        run: its folder.
        rows: the rows in memory that it was started with, if it was.
        reward: the function that it was started with, if it was.
        quiet: print nothing.

    Raises:
        GraftError, Interrupted: as `train`.
    """
    from graft.runs import resume_run

    in_memory = None if rows is None else list(rows)
    return resume_run(run, rows=in_memory, reward=reward, terminal=_terminal(quiet=quiet))


def evaluate(
    model: str | Path | Run,
    rows: Rows,
    reward: Reward | None = None,
    *,
    samples: int = 1,
    quiet: bool = False,
    **settings: Any,
) -> Evaluation:
    """Measure a model: pass@1 and pass@k with 95 % intervals. Nothing is written.

    Args:
        model: as in `train`, or a run, or the folder of one: its newest checkpoint is measured.
        rows: as in `train`. All are measured, unless `data.held_out` sets some aside: then those alone, which
            are the ones that `train` with the same settings does not train on.
        reward: as in `train`.
        samples: completions for each row; pass@k is estimated for k up to it.
        quiet: print nothing.
        **settings: any others, as in `train`.

    Raises:
        GraftError: its kind says what is wrong; see `graft/errors.py`.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if samples < 1:
        raise ConfigError(f"graft.evaluate: samples = {samples}: want at least 1")
    folder = Path(model if isinstance(model, str | Path) else model.path)
    trained = holds_run(folder)
    weights = read_run_config(folder).model.model_dump() if trained else {"name": str(model)}
    source, in_memory = _split_rows(rows)
    function, grader = _split_reward(reward)
    if reward is None and "grader" not in settings:
        raise ConfigError(
            "graft.evaluate: reward is missing; give a function, 'number' or a [grader] section"
        )
    data = _nested({"model": weights, **source, **grader, "training__steps": 1}, settings)
    config = _check(data, run=".", where="graft.evaluate")
    from graft.assemble import assemble

    terminal = _terminal(quiet=quiet)
    parts = assemble(config, rows=in_memory, reward=function, progress=terminal.say)
    if trained:
        load_run_weights(parts.policy, folder)
    with closing(parts):
        return measure(parts, parts.held_out or parts.train, samples=samples, terminal=terminal)


def measure(parts: Parts, prompts: Sequence[Prompt], *, samples: int, terminal: Terminal) -> Evaluation:
    """Sample and grade prompts with the policy of `parts`, showing progress.

    Args:
        parts: as `assemble` makes them, with a grader.
        prompts: rows to measure, at least one.
        samples: completions for each.
        terminal: where progress is shown.

    Raises:
        GraderError: too many samples could not be graded.
        ResourceError: memory ran out.
        Interrupted: Ctrl-C or SIGTERM.
    """
    from graft.assemble import sampling_settings
    from graft.evaluation import evaluate as evaluate_prompts
    from graft.interrupt import Interrupt
    from graft.memory import memory_errors
    from graft.model import plain_state
    from graft.report.terminal import Activity

    config = parts.config
    assert parts.engine is not None
    assert parts.grader is not None
    stopping = "the measurement stops at the next token or grade. Another Ctrl-C or SIGTERM stops it at once."
    with terminal, Interrupt(terminal.say, meaning=stopping) as interrupt:

        def on_tokens(tokens: int) -> None:
            interrupt.check()
            terminal.sampled(tokens)

        terminal.begin(Activity.MEASURING, len(prompts))
        parts.engine.load_weights(plain_state(parts.policy), 0)
        with memory_errors("the evaluation", "rollout.slots or sampling.max_new_tokens"):
            evaluation = evaluate_prompts(
                parts.engine,
                prompts,
                parts.grader,
                parts.encoder.decode,
                samples=samples,
                sampling=sampling_settings(config.sampling, temperature=config.evaluation.temperature),
                threshold=config.evaluation.threshold,
                seed=config.seed,
                max_failure_rate=config.grading.max_failure_rate,
                progress=on_tokens,
                waiting=interrupt.check,
            )
        terminal.measured(len(prompts))
    return evaluation


def _terminal(*, quiet: bool) -> Terminal:
    """Where progress is shown: stderr, or nowhere."""
    from rich.console import Console

    from graft.report.terminal import Terminal

    return Terminal(Console(quiet=True) if quiet else None)


def _split_rows(rows: Rows) -> tuple[dict[str, Any], list[Mapping[str, Any]] | None]:
    """Settings that name the rows, and the rows that are in memory."""
    if isinstance(rows, str | Path):
        return {"data__source": str(rows)}, None
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise ConfigError(
            f"rows: got a {type(rows).__name__}; want a list of dicts, e.g. [{{'prompt': ..., 'answer': ...}}], "
            "or the name of a source, e.g. 'rows.jsonl'"
        )
    return {"data": {}}, list(rows)


def _split_reward(reward: Reward | None) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """The function that is in memory, and the settings of the grader."""
    if reward is None:
        return None, {}
    if isinstance(reward, str):
        if reward.endswith(".json"):
            return None, {"grader": {"file": reward}}
        is_reference = ":" in reward
        return None, {
            "grader": {"type": "function", "function": reward} if is_reference else {"type": reward}
        }
    if isinstance(reward, Mapping):
        return None, {"grader": reward}
    if not callable(reward):
        raise ConfigError(
            f"reward: got a {type(reward).__name__}; want a function (completion, item), 'number', "
            "'file.py:function' or the settings of the [grader] section"
        )
    reference = _importable(reward)
    return reward, {"grader": {"type": "function", "function": reference}} if reference else {}


def _importable(function: Callable[..., Any]) -> str | None:
    """`module:function` if that leads to the function in another process too: the run's settings then say who
    graded, and `graft resume` finds it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(module), name, None) is not function:
        return None
    return f"{module}:{name}"


def _check(data: dict[str, Any], *, run: str, where: str) -> RunConfig:
    data = {"base": str(Path.cwd()), **data, "run": run}
    return check_config(data, where=where)


def _nested(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as tables: `{"training__steps": 3}` becomes `{"training": {"steps": 3}}`; later ones win."""
    data: dict[str, Any] = {}
    for settings in sources:
        for name, value in settings.items():
            _merge(data, name.split("__"), value, name)
    return data


def _merge(table: dict[str, Any], path: Sequence[str], value: Any, name: str) -> None:
    for key in path[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: '{key}' is a value, not a section")
    if isinstance(value, Mapping):
        inner = table.setdefault(path[-1], {})
        if isinstance(inner, dict):
            for key, entry in value.items():
                _merge(inner, [str(key)], entry, name)
            return
    table[path[-1]] = value
