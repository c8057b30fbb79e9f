"""Measuring a little of a run on this machine, so that `estimate.py` can say what all of it would take.

A group of completions as wide as the run's is sampled and graded, and a few micro-batches go through forward,
backward and the optimiser at learning rate 0. Nothing is written but a scratch file that times the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

from graft.algorithm_settings import SFT, Sampled
from graft.algorithms import ALGORITHMS
from graft.assemble import Parts, assemble, build_forward, frozen_copy, load_worked, sampling_settings
from graft.config import RunConfig
from graft.data.worked import worked_trees
from graft.estimate import Estimate, Facts, Memory, Sampling, Speeds, Workload, decode_costs, estimate
from graft.grading.beside import GradingBeside
from graft.memory import memory_errors, peak_memory_gb
from graft.model import plain_state, trainable
from graft.phases import Phase, phases_of
from graft.rollout.grow import grow_groups
from graft.runs import check_grader
from graft.tree import Tree
from graft.types import Credit, Prompt, Purpose, StopReason
from graft.update.packing import MicroBatch, pack
from graft.update.step import POLICY, optimise, policy_loss
from graft.workload import PHASE_NAMES, has_anchor, largest_microbatch, plan_work, trained_share

SAMPLING_SECONDS = 12.0
"""About the longest time for sampling the group; completions are cut off when they would take longer."""

UPDATE_SECONDS = 10.0
"""No further optimiser step begins after so long; of those made in each phase the median counts."""

MAX_UPDATES = 5

SHORT_TOKENS = 8
"""Tokens of each completion in the two short samplings that time a decoding step."""

NARROWER = 8
"""How many times fewer rows the narrow one has."""

WORKED_ROWS = 64
"""Rows whose worked completions are measured."""

SCRATCH_BYTES = 1 << 25


def estimate_run(config: RunConfig, *, progress: Callable[[str], None] | None = None) -> Estimate:
    """Read rows, load the model, measure and count.

    Args:
        config: the settings.
        progress: told of long steps, e.g. a model being fetched.

    Raises:
        GraftError: whatever would stop the run at its start, a reward function that fails included.
    """
    check_grader(config, None)
    began = time.perf_counter()
    parts = assemble(config, progress=progress)
    start = time.perf_counter() - began
    phases = phases_of(config, training_rows=len(parts.train))
    worked = _worked_lengths(parts, phases)
    sampled = _Sampled()
    if parts.engine is not None:
        with memory_errors("sampling", "rollout.slots or sampling.max_new_tokens"):
            sampled = _try_sampling(parts, phases[-1])
    sampling_peak = _peak_bytes(parts)
    with memory_errors(
        "the update", "training.microbatch_tokens, or set model.gradient_checkpointing = true"
    ):
        updated = _try_update(parts, phases, sampled.trees)
    share = trained_share(phases, groups=sampled.groups, with_signal=sampled.groups_with_signal)
    work = plan_work(
        config,
        phases,
        trained_share=share,
        prompt_tokens=_mean_prompt(parts.train),
        held_out=len(parts.held_out) if parts.engine is not None else 0,
        held_out_prompt_tokens=_mean_prompt(parts.held_out) if parts.held_out else 0.0,
        sampled=sampled.lengths,
        worked=worked,
        trained_bytes=_bytes_of(trainable(parts.policy).values()),
    )
    speeds = Speeds(
        start=start,
        prefill_token=sampled.prefill_token,
        decode_step=sampled.decode_step,
        decode_row=sampled.decode_row,
        hand_over=sampled.hand_over,
        grade=sampled.grade,
        train_token=updated.train_token,
        score_token=updated.score_token,
        optimizer=updated.optimizer,
        write_byte=_try_writing(Path(config.run)),
    )
    memory = replace(
        _model_memory(parts),
        sampling_peak=sampling_peak,
        update_peak=_peak_bytes(parts),
        tried_tokens=updated.tokens,
        microbatch_tokens=largest_microbatch(work, config.training.microbatch_tokens),
        anchor=updated.anchor,
    )
    if sampled.call is not None:
        held = sampled.call.engine_bytes(memory, slots=work.slots, max_new_tokens=work.max_new_tokens)
        memory = replace(memory, sampled=held)
    return estimate(
        _facts(parts), work, speeds, memory, assumptions=_assumptions(parts, work, sampled, worked)
    )


def _peak_bytes(parts: Parts) -> int:
    return round(peak_memory_gb(parts.device) * 1e9)


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What the short samplings showed; seconds."""

    trees: Sequence[Tree] = ()
    lengths: Sequence[int] = (1,)
    cut_off: int = 0
    """Completions that were stopped by the limit of this measurement and not by the run's own."""

    truncated: int = 0
    groups: int = 0
    groups_with_signal: int = 0
    call: Sampling | None = None
    prefill_token: float = 0.0
    decode_step: float = 0.0
    decode_row: float = 0.0
    hand_over: float = 0.0
    grade: float = 0.0


def _try_sampling(parts: Parts, phase: Phase) -> _Sampled:
    """Sample and grade one group as wide as the engine will run."""
    assert parts.engine is not None
    assert parts.grader is not None
    config = parts.config
    drawn = isinstance(phase.settings, Sampled)
    group = phase.settings.completions if isinstance(phase.settings, Sampled) else config.evaluation.samples
    available = parts.train[: phase.rows_per_step] if drawn else parts.held_out or parts.train
    slots = min(config.rollout.slots, len(available) * group)
    prompts = available[: -(-slots // group)]
    state = plain_state(parts.policy)
    parts.engine.load_weights(
        state, 0
    )  # the first time makes room for the weights; the run does it each step
    began = time.perf_counter()
    parts.engine.load_weights(state, 0)
    hand_over = time.perf_counter() - began

    short = min(SHORT_TOKENS, config.sampling.max_new_tokens)
    narrow = max(1, slots // NARROWER)
    _, narrow_marks = _grow(parts, prompts[:narrow], 1, short)
    _, wide_marks = _grow(parts, prompts, group, short)
    step_seconds = _step_seconds(wide_marks)
    limit = min(config.sampling.max_new_tokens, max(short, int(SAMPLING_SECONDS / max(step_seconds, 1e-6))))
    trees, marks = _grow(parts, prompts, group, limit)
    decode_step, decode_row = decode_costs(
        (marks[0][0], _step_seconds(marks)), (narrow_marks[0][0], _step_seconds(narrow_marks))
    )
    began = time.perf_counter()
    with closing(parts), GradingBeside(parts.grader, parts.encoder.decode) as beside:
        grades = beside.grades(trees, max_failure_rate=config.grading.max_failure_rate)
    grade = (time.perf_counter() - began) / (len(prompts) * group)
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves()]
    unfinished = [tree.nodes[leaf].stop is StopReason.LENGTH for tree, leaf in leaves]
    capped = limit < config.sampling.max_new_tokens
    lengths = [
        config.sampling.max_new_tokens if late else tree.completion_length(leaf)
        for (tree, leaf), late in zip(leaves, unfinished, strict=True)
    ]
    return _Sampled(
        trees=trees,
        lengths=lengths,
        cut_off=sum(unfinished) if capped else 0,
        truncated=0 if capped else sum(unfinished),
        groups=len(trees),
        groups_with_signal=sum(len({grade.score for grade in own.values()}) > 1 for own in grades),
        call=Sampling(len(prompts), group, _mean_prompt(prompts), lengths),
        prefill_token=marks[0][1] / sum(len(prompt.tokens) for prompt in prompts),
        decode_step=decode_step,
        decode_row=decode_row,
        hand_over=hand_over,
        grade=grade,
    )


Marks = Sequence[tuple[int, float]]
"""After each step of the engine: tokens drawn so far, seconds since the call began."""


def _grow(
    parts: Parts, prompts: Sequence[Prompt], group_size: int, max_new_tokens: int
) -> tuple[list[Tree], Marks]:
    assert parts.engine is not None
    marks: list[tuple[int, float]] = []
    began = time.perf_counter()
    trees = grow_groups(
        parts.engine,
        prompts,
        group_size=group_size,
        sampling=replace(sampling_settings(parts.config.sampling), max_new_tokens=max_new_tokens),
        seed=parts.config.seed,
        purpose=Purpose.TRAIN,
        step=0,
        progress=lambda tokens: marks.append((tokens, time.perf_counter() - began)),
    )
    return trees, marks


def _step_seconds(marks: Marks) -> float:
    """Time of a decoding step in which every row still grows: the median over those."""
    widest = marks[0][0]
    times = [after[1] - before[1] for before, after in pairwise(marks) if after[0] - before[0] == widest]
    return median(times) if times else 0.0


@dataclass(frozen=True, slots=True)
class _Updated:
    """What a few optimiser steps showed; seconds."""

    train_token: Mapping[str, float]
    """By phase: its share of trained tokens decides how much the LM head has to do."""

    score_token: float
    optimizer: float
    anchor: int
    """Bytes of the anchor; 0 without."""

    tokens: int
    """Of the largest micro-batch."""


def _try_update(parts: Parts, phases: Sequence[Phase], sampled: Sequence[Tree]) -> _Updated:
    """Optimiser steps at learning rate 0 on a micro-batch each, of every phase."""
    batches = [_batches(parts, _trees_of(parts, phase, sampled)) for phase in phases]
    anchor, anchor_bytes = None, 0
    if has_anchor(parts.config, phases[-1]):
        weights = {name: tensor.detach().clone() for name, tensor in plain_state(parts.policy).items()}
        anchor = build_forward(frozen_copy(parts.policy, weights), parts.forward.precision)
        anchor_bytes = _bytes_of(parts.policy.plain.parameters())
    group = {"name": POLICY, "params": list(trainable(parts.policy).values())}
    optimizer = torch.optim.AdamW([group], lr=0.0, fused=True)
    _optimise(parts, phases[0], optimizer, batches[0][0])  # makes room for gradients and moments
    tokens: dict[str, float] = {}
    rests: list[float] = []
    for phase, own in zip(phases, batches, strict=True):
        timed: list[float] = []
        began = time.perf_counter()
        while not timed or (
            len(timed) < MAX_UPDATES and time.perf_counter() - began < UPDATE_SECONDS / len(phases)
        ):
            batch = own[len(timed) % len(own)]
            forward_backward, rest = _optimise(parts, phase, optimizer, batch)
            timed.append(forward_backward / len(batch.tokens))
            rests.append(rest)
        tokens[PHASE_NAMES[phase.stage]] = median(timed)
    scoring = 0.0
    settings = phases[-1].settings
    needs_old = isinstance(settings, Sampled) and settings.updates > 1
    if needs_old or has_anchor(parts.config, phases[-1]):
        batch = batches[-1][0]
        began = time.perf_counter()
        with torch.no_grad():
            (anchor or parts.forward)(batch, temperature=parts.config.sampling.temperature)
        scoring = (time.perf_counter() - began) / len(batch.tokens)
    largest = max(len(batch.tokens) for own in batches for batch in own)
    return _Updated(tokens, scoring, median(rests), anchor_bytes, largest)


def _trees_of(parts: Parts, phase: Phase, sampled: Sequence[Tree]) -> Sequence[Tree]:
    if isinstance(phase.settings, SFT):
        return _worked(parts, phase.settings.worked, parts.train[: phase.rows_per_step])
    return sampled


def _optimise(
    parts: Parts, phase: Phase, optimizer: torch.optim.Optimizer, batch: MicroBatch
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the rest of the step."""
    marks: list[float] = []
    algorithm, settings = ALGORITHMS[phase.settings.name], phase.settings
    old = torch.zeros_like(batch.weights, dtype=torch.float32)
    loss = policy_loss(
        parts.forward,
        lambda tokens: algorithm.loss(replace(tokens, anchor_logprobs=old), settings),
        temperature=parts.config.sampling.temperature,
        entropy_gradient=isinstance(settings, Sampled) and settings.entropy.coefficient != 0,
    )
    began = time.perf_counter()
    optimise(
        loss,
        optimizer,
        [batch],
        max_gradient_norm=phase.optimizer.max_gradient_norm,
        learning_rates={POLICY: 0.0},
        progress=lambda _: marks.append(time.perf_counter() - began),
    )
    return marks[0], time.perf_counter() - began - marks[0]


def _batches(parts: Parts, trees: Sequence[Tree]) -> list[MicroBatch]:
    """The first two micro-batches of trees whose completions all train."""
    credits = []
    for tree in trees:
        lengths = {leaf: len(tree.nodes[leaf]) for leaf in tree.leaves()}
        credits.append(
            Credit(
                advantages={leaf: np.ones(n, dtype=np.float32) for leaf, n in lengths.items()},
                weights={leaf: np.full(n, 1e-3) for leaf, n in lengths.items()},
            )
        )
    packed = pack(trees, credits, token_budget=parts.config.training.microbatch_tokens)
    return [batch.to(parts.device) for batch in packed[:2]]


def _worked(parts: Parts, reference: str, prompts: Sequence[Prompt]) -> list[Tree]:
    return worked_trees(prompts, load_worked(reference, Path(parts.config.base)), parts.encoder)


def _worked_lengths(parts: Parts, phases: Sequence[Phase]) -> list[int] | None:
    """Tokens of worked completions, where a phase trains on them."""
    for phase in phases:
        if isinstance(phase.settings, SFT):
            trees = _worked(parts, phase.settings.worked, parts.train[:WORKED_ROWS])
            return [tree.completion_length(leaf) for tree in trees for leaf in tree.leaves()]
    return None


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
        gradients=_bytes_of(trainable(parts.policy).values()),
        optimizer=2 * _bytes_of(trainable(parts.policy).values()),
        anchor=0,
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
        prompt_tokens_mean=_mean_prompt(every),
        prompt_tokens_longest=max(len(prompt.tokens) for prompt in every),
        model=parts.config.model.name,
        parameters=sum(p.numel() for p in parts.policy.model.parameters()),
        parameters_trained=sum(p.numel() for p in trainable(parts.policy).values()),
        device=parts.device.type,
        precision=parts.fingerprint["precision"],
        engine=parts.fingerprint["engine"] or "no",
        threads=torch.get_num_threads(),
    )


def _assumptions(parts: Parts, work: Workload, sampled: _Sampled, worked: Sequence[int] | None) -> list[str]:
    lines = []
    if sampled.call is not None:
        count, limit = len(sampled.lengths), parts.config.sampling.max_new_tokens
        lines.append(
            f"completions have {sum(sampled.lengths) / count:.0f} tokens, the mean of {count} sampled now "
            f"({sampled.truncated} of them reached sampling.max_new_tokens = {limit})"
        )
        if sampled.cut_off:
            lines.append(
                f"{sampled.cut_off} of these were stopped early to save time and count as {limit} tokens, so "
                "time and tokens are an upper bound"
            )
    if worked is not None:
        lines.append(
            f"after training on worked completions they are as long as those, {sum(worked) / len(worked):.0f} tokens"
        )
    if work.phases[-1].drawn:
        lines.append(
            f"{100 * work.phases[-1].trained_share:.0f} % of the groups train; one whose scores are all equal "
            "takes no time in the update"
        )
    lines.append("the machine stays as busy or idle as it was now")
    return lines


def _mean_prompt(prompts: Sequence[Prompt]) -> float:
    return sum(len(prompt.tokens) for prompt in prompts) / len(prompts)


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
