"""Measuring a little of a run on this machine, so that `estimate.py` can say what all of it would take.

Held-out rows are sampled as a measurement does, as many as fill the engine; trees as wide as the run's are drawn,
graded and criticised, and a few of them go through the trainer of every phase: what networks that stand still say of
them, forward, backward and optimiser, with the phase's own settings, at learning rate 0. A warm start is made in
between, or as much of it as there is time for: it changes what the model says, and so all that follows. Nothing is
written but a scratch file that times the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from graft.algorithm_settings import SFT, OnTrees, Sampled
from graft.assemble import Parts, assemble
from graft.config import RunConfig
from graft.estimate import Memory, PhaseWork, SamplingSpeeds, Speeds, Workload, estimate
from graft.estimated import Estimate, Facts
from graft.graders import judges_of
from graft.held_out_loss import having_worked
from graft.memory import memory_errors, peak_memory_gb
from graft.model import trainable
from graft.phases import Phase, phases_of
from graft.report.metrics import Stage
from graft.runs import check_grader
from graft.trainer import asks_exact_kl
from graft.trial_sampling import (
    TriedSampling,
    judged_elsewhere,
    mean_prompt,
    try_handing_over,
    try_measuring,
    try_sampling,
)
from graft.trial_update import TriedUpdate, read_share_of, read_tokens, rehearse, try_update, worked_out
from graft.types import Grade
from graft.workload import (
    PHASE_NAMES,
    HeldOut,
    Tried,
    largest_microbatch,
    needs_appraisal,
    plan_work,
    validates,
)

WORKED_ROWS = 64
"""Rows whose worked completions are measured."""

SCRATCH_BYTES = 1 << 25

_TRIED_NAMES = {Stage.WARM_START: "the warm start", Stage.TRAIN: "a step of training"}


def estimate_run(config: RunConfig, *, progress: Callable[[str], None] | None = None) -> Estimate:
    """Read rows, load the model, measure and count.

    Args:
        config: the settings.
        progress: told of long steps, e.g. a model being fetched or what is tried now.

    Raises:
        GraftError: whatever would stop the run at its start, a reward function that fails included.
    """
    check_grader(config, None)
    began = time.perf_counter()
    with closing(assemble(config, progress=progress)) as parts:
        say = progress or _silent
        for note in parts.notes:
            say(note)
        return _estimate(parts, say, start=time.perf_counter() - began)


def _silent(_: str) -> None:
    """Nobody is told."""


def _estimate(parts: Parts, progress: Callable[[str], None], *, start: float) -> Estimate:
    """What the parts of a run show when a little of it is tried; `start`: seconds that they took to build."""
    config = parts.config
    phases = phases_of(config, training_rows=len(parts.train))
    hand_over, measuring, sampling_peak = 0.0, None, 0
    if parts.engine is not None:
        progress("trying a measurement on held-out rows ...")
        with memory_errors("sampling", "rollout.slots or sampling.max_new_tokens"):
            hand_over = try_handing_over(parts)
            measuring = try_measuring(parts)
        sampling_peak = _peak_bytes(parts)
        parts.engine.drop_weights()
    tried: list[_TriedPhase] = []
    for phase in phases:
        progress(f"trying {_TRIED_NAMES[phase.stage]} ...")
        tried.append(_try_phase(parts, phase))
    updated, sampled = [own.updated for own in tried], tried[-1].sampled
    work = plan_work(
        config,
        phases,
        prompt_tokens=mean_prompt(parts.train),
        held_out=_held_out(parts, phases, measuring),
        tried=[own.completions for own in tried],
        checkpoint_bytes=max(own.checkpoint for own in updated),
    )
    by_phase = [(PHASE_NAMES[phase.stage], own) for phase, own in zip(phases, updated, strict=True)]
    speeds = Speeds(
        start=start,
        measuring=SamplingSpeeds() if measuring is None else measuring.speeds,
        training=SamplingSpeeds() if sampled is None else sampled.speeds,
        hand_over=hand_over,
        train_token={name: own.train_token for name, own in by_phase},
        score_token={name: own.score_token for name, own in by_phase},
        anchor_token=updated[-1].anchor_token,
        optimizer={name: own.optimizer for name, own in by_phase},
        write_byte=_try_writing(Path(config.run)),
    )
    memory = replace(
        _model_memory(parts),
        sampling_peak=sampling_peak,
        update_peak=_peak_bytes(parts),
        tried_tokens=max(own.microbatch for own in updated),
        microbatch_tokens=largest_microbatch(work, config.training.microbatch_tokens),
        gradients=max(own.trained for own in updated),
        optimizer=2 * max(own.trained for own in updated),
        copies=max(own.copies for own in updated),
        held_states=_held_states(parts, phases[-1], work),
    )
    if measuring is not None:
        held = measuring.call.engine_bytes(memory, slots=work.slots, max_new_tokens=work.max_new_tokens)
        memory = replace(memory, sampled=held)
    return estimate(_facts(parts), work, speeds, memory, assumptions=_assumptions(parts, phases, work, tried))


@dataclass(frozen=True, slots=True)
class _TriedPhase:
    """What a phase showed."""

    completions: Tried
    updated: TriedUpdate
    sampled: TriedSampling | None = None
    """None where rows bring their own completions."""

    rehearsed: int = 0
    """Steps of a warm start that were made."""


def _try_phase(parts: Parts, phase: Phase) -> _TriedPhase:
    """A little of a phase; after a warm start the policy is another, as in the run."""
    settings = phase.settings
    if isinstance(settings, SFT):
        trees = worked_out(parts, settings, parts.train[:WORKED_ROWS])
        lengths = [tree.completion_length(leaf) for tree in trees for leaf in tree.leaves()]
        updated = try_update(parts, phase, trees[: phase.rows_per_step])
        rehearsed = rehearse(parts, phase) if phase.stage is Stage.WARM_START else 0
        return _TriedPhase(Tried(lengths, read_share_of(parts, trees)), updated, rehearsed=rehearsed)
    assert parts.engine is not None
    with memory_errors("sampling", "rollout.slots or sampling.max_new_tokens"):
        try_handing_over(parts)
        sampled = try_sampling(parts, phase)
    parts.engine.drop_weights()  # as between sampling and update
    trees = sampled.trees
    if parts.critic is not None and not isinstance(settings, OnTrees):
        no_grades = [dict.fromkeys(tree.leaves(), Grade(0.0)) for tree in trees]
        trees = parts.critic.cut(trees, no_grades)[0]
    return _TriedPhase(sampled.tried, try_update(parts, phase, trees), sampled)


def _peak_bytes(parts: Parts) -> int:
    return round(peak_memory_gb(parts.device) * 1e9)


def _held_out(parts: Parts, phases: Sequence[Phase], measuring: TriedSampling | None) -> HeldOut:
    """What is measured on."""
    if not parts.held_out:
        return HeldOut()
    rows = 0 if measuring is None else len(parts.held_out)
    lengths = (1,) if measuring is None else measuring.tried.lengths
    worked = 0
    for settings in validates(phases)[:1]:
        have = having_worked(parts.held_out[: parts.config.evaluation.rows], settings.worked)
        trees = worked_out(parts, settings, have)
        worked = read_tokens(parts, trees)[0] if trees else 0
    return HeldOut(rows, mean_prompt(parts.held_out), worked, lengths)


def _held_states(parts: Parts, phase: Phase, work: Workload) -> int:
    """Bytes of the anchor's hidden states of all tokens of a step, once as they are held and once packed."""
    settings = phase.settings
    if not (isinstance(settings, Sampled) and settings.kl.in_loss and asks_exact_kl(phase)):
        return 0
    own = work.phases[-1]
    tokens = own.batch.prompts * own.tokens_a_prompt
    return round(2 * 4 * tokens * parts.policy.plain.get_output_embeddings().weight.shape[1])


def _try_writing(run: Path) -> float:
    """Seconds for a byte that is safe on the disk where the run will be."""
    folder = next(parent for parent in run.absolute().parents if parent.is_dir())
    with tempfile.TemporaryFile(dir=folder) as file:
        block = bytes(SCRATCH_BYTES)
        began = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - began) / SCRATCH_BYTES


def _model_memory(parts: Parts) -> Memory:
    """What follows from the model; the peaks are filled in later."""
    config = parts.policy.plain.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = 2 if parts.forward.precision.name == "bf16" else 4
    return Memory(
        sampling_peak=0,
        update_peak=0,
        tried_tokens=1,
        microbatch_tokens=0,
        gradients=0,
        optimizer=0,
        copies=0,
        held_states=0,
        cached_token=2 * config.num_hidden_layers * heads * width * element,
        prompt_logits=4 * config.vocab_size,
        sampled=0.0,
    )


def _facts(parts: Parts) -> Facts:
    every = [*parts.train, *parts.held_out]
    return Facts(
        run=parts.config.run,
        rows_train=len(parts.train),
        rows_held_out=len(parts.held_out),
        prompt_tokens_mean=mean_prompt(every),
        prompt_tokens_longest=max(len(prompt.tokens) for prompt in every),
        model=parts.config.model.name,
        parameters=sum(p.numel() for p in parts.policy.model.parameters()),
        parameters_trained=sum(p.numel() for p in trainable(parts.policy).values()),
        device=parts.device.type,
        precision=parts.fingerprint["precision"],
        engine=parts.fingerprint["engine"] or "no",
        threads=torch.get_num_threads(),
    )


def _assumptions(
    parts: Parts, phases: Sequence[Phase], work: Workload, tried: Sequence[_TriedPhase]
) -> list[str]:
    lines = []
    own, settings, sampled = work.phases[-1], phases[-1].settings, tried[-1].sampled
    for phase, found in zip(phases, tried, strict=True):
        if phase.stage is Stage.WARM_START:
            lines.append(
                f"the model is the one after {found.rehearsed} of {phase.steps} steps of the warm start, made now in "
                "memory"
            )
    lengths = tried[-1].completions.lengths
    mean = f"{sum(lengths) / len(lengths):.0f} tokens"
    if sampled is None:
        lines.append(f"completions are as long as the worked ones, {mean}")
    else:
        limit = parts.config.sampling.max_new_tokens
        lines.append(
            f"completions have {mean}, the mean of {len(lengths)} sampled now ({sampled.truncated} of them reached "
            f"sampling.max_new_tokens = {limit})"
        )
        if sampled.cut_off:
            lines.append(
                f"{sampled.cut_off} of these were stopped early to save time and count as {limit} tokens, so "
                "time and tokens are an upper bound"
            )
    if own.drawn:
        lines.append(
            f"the network reads {100 * own.read_share:.0f} % of the tokens drawn, as of those drawn now: equal "
            "beginnings are read once, and a model that is surer draws more of them"
        )
        lines += _signal_assumptions(own)
    base = Path(parts.config.base)
    if parts.critic is not None and judged_elsewhere(settings, base):
        paths = own.batch.samples if own.grown is None else own.grown.paths
        lines.append(
            "the critic's judge was not asked: neither its time nor its tokens are counted, and all that is drawn "
            f"counts as trained; it will be asked about {own.batch.prompts * paths:.0f} completions a step"
        )
    judges = judges_of(parts.config.grader, base)
    if judges and parts.engine is not None:
        lines.append(f"the grader asked {', '.join(judges)} about what was sampled now, as in the run")
    if isinstance(settings, Sampled) and needs_appraisal(settings) and hasattr(settings, "value"):
        warm = settings.value.warmup_steps  # pyright: ignore[reportAttributeAccessIssue]
        if warm:
            lines.append(
                f"the first {warm} steps, in which the value model trains alone, take as long as the others"
            )
    if any(phase.early_stopping is not None for phase in phases):
        lines.append("nothing stops early")
    lines.append("the machine stays as busy or idle as it was now")
    return lines


def _signal_assumptions(own: PhaseWork) -> list[str]:
    if own.rounds:
        return [
            f"a step draws {own.prompts_drawn} prompts in {len(own.rounds)} rounds for {own.batch.prompts} groups "
            "whose scores differ, at the share of such groups among those drawn now (half of them where there was "
            "nothing to tell)"
        ]
    if own.trained_share < 1:
        return [
            f"{100 * own.trained_share:.0f} % of these go through the update: a group whose scores are all equal "
            "does not train; as the model learns there are more of these, and steps get cheaper"
        ]
    return []
