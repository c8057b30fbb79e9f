"""What a run will do, as counts: settings and rows -> `estimate.Workload`. Follows `loop.py`. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from graft.algorithm_settings import Sampled
from graft.config import RunConfig
from graft.estimate import EvaluationWork, PhaseWork, Sampling, Workload, share_with_signal
from graft.phases import Phase
from graft.report.metrics import Moment, Stage

PHASE_NAMES = {Stage.WARM_START: "warm start", Stage.TRAIN: "training"}
MOMENT_NAMES = {
    Moment.BEFORE: "measuring before",
    Moment.AFTER_WARM_START: "measuring after warm start",
    Moment.DURING: "measuring during training",
    Moment.AFTER: "measuring after",
}


def plan_work(
    config: RunConfig,
    phases: Sequence[Phase],
    *,
    trained_share: float,
    prompt_tokens: float,
    held_out: int,
    held_out_prompt_tokens: float,
    sampled: Sequence[int],
    worked: Sequence[int] | None,
    trained_bytes: int,
) -> Workload:
    """What the loop will do, as counts.

    Args:
        config: the settings.
        phases: of the run.
        trained_share: share of sampled groups that go through the network in the update.
        prompt_tokens: mean of the training rows.
        held_out: rows to measure on; 0 where nothing is measured.
        held_out_prompt_tokens: their mean.
        sampled: lengths of completions of the model as it is given.
        worked: lengths of worked completions, where there are any: the model's own once it has learned from them.
        trained_bytes: of the parameters that train.
    """
    works, measured = [], [(MOMENT_NAMES[Moment.BEFORE], 1, held_out, sampled)]
    lengths = sampled
    for phase in phases:
        drawn = isinstance(phase.settings, Sampled)
        if not drawn and worked is not None:
            lengths = worked
        batch = Sampling(
            prompts=phase.rows_per_step,
            samples=phase.settings.completions if isinstance(phase.settings, Sampled) else 1,
            prompt_tokens=prompt_tokens,
            lengths=lengths,
        )
        steps = phase_steps(phase, batch)
        works.append(
            PhaseWork(
                name=PHASE_NAMES[phase.stage],
                steps=steps,
                batch=batch,
                drawn=drawn,
                updates=phase.settings.updates if isinstance(phase.settings, Sampled) else 1,
                scorings=scorings(config, phase, steps),
                trained_share=trained_share if drawn else 1.0,
            )
        )
        if phase.stage is Stage.TRAIN:
            during = _times(config.evaluation.every, steps) + _times(
                config.evaluation.every_generated_tokens, round(steps * batch.tokens) if drawn else 0
            )
            rows = min(config.evaluation.rows or held_out, held_out)
            measured.append((MOMENT_NAMES[Moment.DURING], during, rows, lengths))
        measured.append((MOMENT_NAMES[phase.after], 1, held_out, lengths))
    saves = sum(1 + _times(config.checkpoints.every, work.steps) for work in works)
    return Workload(
        phases=works,
        evaluations=[
            EvaluationWork(
                name, times, Sampling(rows, config.evaluation.samples, held_out_prompt_tokens, own)
            )
            for name, times, rows, own in measured
            if rows and times
        ],
        written_bytes=saves * 3 * trained_bytes,  # the weights and two moments of each
        slots=config.rollout.slots,
        max_new_tokens=config.sampling.max_new_tokens,
    )


def phase_steps(phase: Phase, batch: Sampling) -> int:
    """Its optimiser steps; those that its tokens last for where it ends with these."""
    if phase.generated_tokens is not None:
        return math.ceil(phase.generated_tokens / batch.tokens)
    assert phase.steps is not None
    return phase.steps


def scorings(config: RunConfig, phase: Phase, steps: int) -> float:
    """Forward passes without gradient over a step's batch, on average: the loop's `score`."""
    if not isinstance(phase.settings, Sampled):
        return 0.0
    reported = 0.0
    if phase.stage is Stage.TRAIN and config.report.kl_every:
        reported = (steps // config.report.kl_every) / steps
    penalised = phase.settings.kl.coefficient != 0
    needs_old = phase.settings.updates > 1
    return (1.0 if penalised else reported) + (1.0 if needs_old else reported)


def largest_microbatch(work: Workload, budget: int) -> int:
    """Tokens of the largest micro-batch: the budget, or a whole step where that has fewer."""
    return min(budget, max(round(phase.update_tokens) for phase in work.phases))


def trained_share(phases: Sequence[Phase], *, groups: int, with_signal: int) -> float:
    """Share of the groups that the update will see. What was sampled tells nothing once a warm start has changed
    the model; KL and entropy in the loss need every group."""
    settings = phases[-1].settings
    if isinstance(settings, Sampled) and (settings.kl.coefficient or settings.entropy.coefficient):
        return 1.0
    if len(phases) > 1:
        return share_with_signal(0, 0)
    return share_with_signal(groups, with_signal)


def has_anchor(config: RunConfig, phase: Phase) -> bool:
    """Whether a phase keeps a copy of the weights that it starts with: the loop's `open_anchor`."""
    penalised = isinstance(phase.settings, Sampled) and phase.settings.kl.coefficient != 0
    return penalised or config.report.kl_every is not None


def _times(every: int | None, count: int) -> int:
    """How often something due every so many steps (or tokens) happens before the last one."""
    return 0 if every is None else max(0, count - 1) // every
