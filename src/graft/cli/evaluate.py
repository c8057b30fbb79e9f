"""`graft eval CONFIG-or-RUN`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.common import AsJson, Overrides, print_json, say
from graft.errors import ConfigError

if TYPE_CHECKING:
    from graft.config import RunConfig
    from graft.evaluation import Estimate, Evaluation


def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="Of a settings file the model is measured as it was before training, of a run the newest checkpoint.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Measure this model instead, on the same rows.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Completions for each row; pass@k is estimated for k up to it. Default: evaluation.samples.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Held-out rows, the first ones. Default: all.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on held-out rows: pass@1 and pass@k with 95 % intervals. Writes nothing."""
    from graft.config_file import load_config
    from graft.saved_runs import holds_run, load_run_weights, read_run_config

    trained = holds_run(target)
    if not trained and target.is_dir():
        raise ConfigError(f"{target}: a folder, but no run's. Give a run folder or a settings file.")
    settings = read_run_config(target, overrides or ()) if trained else load_config(target, overrides or ())
    if model is not None:
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"name": model})})
    _refuse_unmeasurable(settings)

    from graft.api import measure
    from graft.assemble import assemble
    from graft.report.terminal import Terminal

    terminal = Terminal()
    parts = assemble(settings, progress=terminal.say)
    step = None
    if trained and model is None:
        step = load_run_weights(parts.policy, target)
        say(f"{target}: checkpoint of step {step}")
    samples = samples or settings.evaluation.samples
    with closing(parts):
        evaluation = measure(parts, parts.held_out[:rows], samples=samples, terminal=terminal)
    measured = str(target) if step is not None else settings.model.name
    if as_json:
        print_json(_as_record(evaluation, measured=measured, step=step, samples=samples))
    else:
        print(_as_text(evaluation, measured=measured, step=step, samples=samples))


def _refuse_unmeasurable(settings: RunConfig) -> None:
    if not settings.data.held_out and settings.data.held_out_source is None:
        raise ConfigError(
            "data.held_out = 0: there are no held-out rows to measure. Set some aside, e.g. --set data.held_out=100, "
            "or name them with data.held_out_source."
        )
    if settings.grader is None:
        raise ConfigError(
            "measuring needs a [grader] section, e.g. --set grader.type=number --set grader.key=answer. For a run "
            "whose reward function was in memory use `graft.evaluate` from Python."
        )


def _as_record(evaluation: Evaluation, *, measured: str, step: int | None, samples: int) -> dict[str, Any]:
    return {
        "model": measured,
        "checkpoint": step,
        "rows": evaluation.rows,
        "samples": samples,
        "pass_at": {str(k): asdict(estimate) for k, estimate in evaluation.pass_at.items()},
        "reward_mean": evaluation.reward_mean,
        "length_mean": evaluation.length_mean,
        "truncated_share": evaluation.truncated_share,
        "failed": evaluation.failed,
        "generated_tokens": evaluation.generated_tokens,
    }


def _as_text(evaluation: Evaluation, *, measured: str, step: int | None, samples: int) -> str:
    each = "1 completion" if samples == 1 else f"{samples} completions"
    lines = [
        f"{'model':<12}{measured}" + (f", step {step}" if step is not None else ""),
        f"{'rows':<12}{evaluation.rows} held-out, {each} each",
        *(f"{f'pass@{k}':<12}{_percent(estimate)}" for k, estimate in evaluation.pass_at.items()),
        f"{'reward':<12}{evaluation.reward_mean:.4g} on average",
        f"{'length':<12}{evaluation.length_mean:.1f} tokens on average, "
        f"{100 * evaluation.truncated_share:.1f} % cut off at the limit",
    ]
    if evaluation.failed:
        lines.append(f"{'no score':<12}{evaluation.failed} completions could not be graded and are left out")
    return "\n".join(lines)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} %  (95 %: {100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
