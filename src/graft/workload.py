"""What a run will do, as counts: settings, rows and what was tried -> `estimate.Workload`. Follows `loop.py`.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from graft.algorithm_settings import GRFT, SFT, Grouped, OnTrees, ProcessGRPO, Sampled
from graft.collect import needed
from graft.config import RunConfig
from graft.estimate import (
    Critiques,
    EvaluationWork,
    GrownTree,
    PhaseWork,
    Sampling,
    ValidationWork,
    Workload,
)
from graft.phases import Phase
from graft.report.metrics import Moment, Stage

PHASE_NAMES = {Stage.WARM_START: "warm start", Stage.TRAIN: "training"}
MOMENT_NAMES = {
    Moment.BEFORE: "measuring before",
    Moment.AFTER_WARM_START: "measuring after warm start",
    Moment.DURING: "measuring during training",
    Moment.AFTER: "measuring after",
}


@dataclass(frozen=True, slots=True)
class Tried:
    """What a few completions showed, drawn or worked."""

    lengths: Sequence[int]
    """Tokens of each."""

    read_share: float = 1.0
    """As in `PhaseWork`; so are the next two."""

    grown: GrownTree | None = None
    critiques: Critiques = field(default_factory=Critiques)
    groups: int = 0
    """Of whole completions that were compared."""

    groups_with_signal: int = 0
    trained_share: float = 1.0
    """Of the tokens that the network reads, those that it reads where only groups with signal train."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows to measure on."""

    rows: int = 0
    """0 where no completions are measured."""

    prompt_tokens: float = 0.0
    """Mean."""

    worked_tokens: float = 0.0
    """That the network reads for the validation loss; 0 where none is measured."""

    lengths: Sequence[int] = (1,)
    """Tokens of completions of the model as it is given."""


def plan_work(
    config: RunConfig,
    phases: Sequence[Phase],
    *,
    prompt_tokens: float,
    held_out: HeldOut,
    tried: Sequence[Tried],
    checkpoint_bytes: int,
) -> Workload:
    """What the loop will do, as counts.

    Args:
        config: the settings.
        phases: of the run.
        prompt_tokens: mean of the training rows.
        held_out: rows to measure on.
        tried: for each phase, what completions of its kind showed: the model's own are as long from then on, and
            before an algorithm that samples.
        checkpoint_bytes: of one checkpoint.
    """
    works: list[PhaseWork] = []
    measured = [(MOMENT_NAMES[Moment.BEFORE], 1, held_out.rows, held_out.lengths)]
    validations: list[ValidationWork] = []
    lengths = tried[-1].lengths
    for phase, own in zip(phases, tried, strict=True):
        work = phase_work(config, phase, own, prompt_tokens=prompt_tokens)
        works.append(work)
        during = 0
        if phase.stage is Stage.TRAIN:
            drawn_tokens = round(work.steps * work.sampled_tokens)
            during = _times(config.evaluation.every, work.steps)
            during += _times(config.evaluation.every_generated_tokens, drawn_tokens)
            rows = min(config.evaluation.rows or held_out.rows, held_out.rows)
            measured.append((MOMENT_NAMES[Moment.DURING], during, rows, lengths))
        measured.append((MOMENT_NAMES[phase.after], 1, held_out.rows, lengths))
        if phase.validates and held_out.worked_tokens:
            between = during if phase.stage is Stage.TRAIN else work.steps // (phase.validate_every or 1)
            first = phase is phases[0]  # measured before training, too
            validations.append(ValidationWork(work.name, first + between + 1, held_out.worked_tokens))
    saves = sum(1 + _times(config.checkpoints.every, work.steps) for work in works)
    return Workload(
        phases=works,
        evaluations=[
            EvaluationWork(
                name, times, Sampling(rows, config.evaluation.samples, held_out.prompt_tokens, own)
            )
            for name, times, rows, own in measured
            if rows and times
        ],
        validations=validations,
        written_bytes=saves * checkpoint_bytes,
        slots=config.rollout.slots,
        max_new_tokens=config.sampling.max_new_tokens,
    )


def phase_work(
    config: RunConfig,
    phase: Phase,
    tried: Tried,
    *,
    prompt_tokens: float,
) -> PhaseWork:
    """One phase.

    Args:
        config: the settings.
        phase: of the run.
        tried: what completions of its kind showed.
        prompt_tokens: mean of the training rows.
    """
    settings = phase.settings
    sampled = settings if isinstance(settings, Sampled) else None
    share, rounds, prompts = 1.0, (), phase.rows_per_step
    if sampled is not None:
        most = getattr(settings, "max_sampling_rounds", 1)
        if most > 1:
            signal = share_with_signal(tried.groups, tried.groups_with_signal)
            rounds, prompts = sampling_rounds(prompts, signal, most)
        elif compares_alone(sampled):
            share = tried.trained_share
    batch = Sampling(prompts, 1 if sampled is None else side_by_side(sampled), prompt_tokens, tried.lengths)
    work = PhaseWork(
        name=PHASE_NAMES[phase.stage],
        steps=1,
        batch=batch,
        drawn=sampled is not None,
        rounds=rounds,
        grown=tried.grown,
        critiques=tried.critiques,
        passes=getattr(settings, "updates_per_batch", 1),
        optimizer_steps=1 if sampled is None else sampled.updates,
        scores_all=sampled is not None and needs_appraisal(sampled),
        trained_share=share,
        read_share=tried.read_share,
    )
    steps = phase_steps(phase, work)
    policy, anchor = scorings(config, phase, steps, trained_share=work.trained_share)
    return replace(work, steps=steps, scorings=policy, anchor_scorings=anchor)


def side_by_side(settings: Sampled) -> int:
    """Completions of a prompt that may grow at the same time."""
    return settings.open_paths if isinstance(settings, OnTrees) else settings.group_size


def share_with_signal(seen: int, with_signal: float) -> float:
    """Share of groups whose scores differ, from those seen: (k + 1) / (n + 2), one half where none was seen."""
    return (with_signal + 1) / (seen + 2)


def compares_alone(settings: Sampled) -> bool:
    """Whether groups without signal stay out of the network: their samples are compared with each other and nothing
    else, no KL tells them apart, and no penalty needs them."""
    grouped = isinstance(settings, Grouped | ProcessGRPO | GRFT)
    return grouped and settings.kl.coefficient == 0 and settings.entropy.coefficient == 0


def sampling_rounds(wanted: int, share: float, most: int) -> tuple[tuple[int, ...], int]:
    """Prompts of each round of dynamic sampling, and how many of them train, as `collect` draws them when just this
    share of the groups has signal.

    Args:
        wanted: prompts of a step.
        share: of the groups that have signal, above 0.
        most: rounds.
    """
    rounds: list[int] = []
    useful = 0.0
    while len(rounds) < most and useful < wanted - 1e-9:
        rounds.append(needed(wanted, useful, sum(rounds) - useful))
        useful += share * rounds[-1]
    return tuple(rounds), min(wanted, max(1, round(useful)))


def phase_steps(phase: Phase, work: PhaseWork) -> int:
    """Its optimiser steps; those that its tokens last for where it ends with these."""
    if phase.generated_tokens is not None:
        return math.ceil(phase.generated_tokens / work.sampled_tokens)
    assert phase.steps is not None
    return phase.steps


def needs_appraisal(settings: Sampled) -> bool:
    """Whether the credit asks networks about every token drawn: `crediting.credit_needs_appraisal`."""
    return hasattr(settings, "value") or settings.kl.in_reward


def scorings(
    config: RunConfig, phase: Phase, steps: int, *, trained_share: float = 1.0
) -> tuple[float, float]:
    """Forward passes without gradient over what trains of a step's batch, on average: of the policy, and of the KL
    anchor. Where KL is reported they see the rest of the batch, too.

    The loop's `credit` and `update`.
    """
    settings = phase.settings
    if not isinstance(settings, Sampled):
        return 0.0, 0.0
    penalised = settings.kl.coefficient != 0
    on_rollout = settings.kl.anchor == "rollout"
    reported = 0.0
    if config.report.kl_every:
        reported = (steps // config.report.kl_every) / steps
    if penalised and getattr(settings.kl, "of", "policy") == "rollout":
        reported = 1.0
    rest = reported * (1 - trained_share) / trained_share
    anchor = 0.0 if on_rollout else rest + (1.0 if penalised else reported)
    return rest + max(reported, scored_share(settings)), anchor


def scored_share(settings: Sampled) -> float:
    """Share of the steps that ask the policy that sampled for its log-probabilities, reports apart: all where several
    updates, a value model or the anchor need them, otherwise those whose weights are older."""
    on_rollout = settings.kl.coefficient != 0 and settings.kl.anchor == "rollout"
    if needs_appraisal(settings) or settings.updates > 1 or on_rollout:
        return 1.0
    return (settings.refresh_every - 1) / settings.refresh_every


def largest_microbatch(work: Workload, budget: int) -> int:
    """Tokens of the largest micro-batch: the budget, or a whole step where that has fewer."""
    return min(budget, max(round(max(p.update_tokens, p.scored_tokens)) for p in work.phases))


def validates(phases: Sequence[Phase]) -> list[SFT]:
    """Settings of the phases that measure a validation loss."""
    return [phase.settings for phase in phases if phase.validates and isinstance(phase.settings, SFT)]


def keeps_rollout(phase: Phase) -> bool:
    """Whether a phase keeps a copy of the weights that sample."""
    return isinstance(phase.settings, Sampled) and phase.settings.refresh_every > 1


def _times(every: int | None, count: int) -> int:
    """How often something due every so many steps (or tokens) happens before the last one."""
    return 0 if every is None else max(0, count - 1) // every
