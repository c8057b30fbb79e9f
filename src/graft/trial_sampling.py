"""Drawing, grading and criticising a few trees of a run, to see how long it takes and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median

from graft.algorithm_settings import GRFT, OnTrees, Sampled
from graft.assemble import Parts, sampling_settings
from graft.collect import has_signal
from graft.drawing import criticise, draw
from graft.estimate import Critiques, GrownTree, Sampling
from graft.grading.beside import GradingBeside
from graft.model import plain_state
from graft.phases import Phase
from graft.rollout.grow import grow_groups
from graft.tree import Tree
from graft.trial_update import read_share_of
from graft.types import Grade, Prompt, Purpose, StopReason
from graft.workload import Tried, judged_elsewhere

SAMPLING_SECONDS = 12.0
"""About the longest time for sampling the group; completions are cut off when they would take longer."""

SHORT_TOKENS = 8
"""Tokens of each completion in the two short samplings that time a decoding step."""

NARROWER = 8
"""How many times fewer rows the narrow one has."""

CRITICISED_TREES = 4
"""Most trees that the critic is tried on."""


@dataclass(frozen=True, slots=True)
class TriedSampling:
    """What the short samplings showed; seconds."""

    trees: Sequence[Tree] = ()
    tried: Tried = field(default_factory=lambda: Tried(lengths=(1,)))
    cut_off: int = 0
    """Completions that were stopped by the limit of this measurement and not by the run's own."""

    truncated: int = 0
    call: Sampling | None = None
    prefill_token: float = 0.0
    decode_step: float = 0.0
    decode_row: float = 0.0
    hand_over: float = 0.0
    grade: float = 0.0


def try_sampling(parts: Parts, phase: Phase) -> TriedSampling:
    """Draw, grade and criticise trees, as many as fill the engine as the run does."""
    assert parts.engine is not None
    assert parts.grader is not None
    config = parts.config
    settings = phase.settings if isinstance(phase.settings, Sampled) else None
    group = config.evaluation.samples if settings is None else settings.group_size
    available = parts.train[: phase.rows_per_step] if settings else parts.held_out or parts.train
    slots = min(config.rollout.slots, len(available) * group)
    prompts = available[: -(-slots // group)]
    state = plain_state(parts.policy)
    parts.engine.load_weights(
        state, 0
    )  # the first time makes room for the weights; the run does it each step
    began = time.perf_counter()
    parts.engine.load_weights(state, 0)
    hand_over = time.perf_counter() - began

    longest = config.sampling.max_new_tokens
    short = min(SHORT_TOKENS, longest)
    narrow = max(1, slots // NARROWER)
    _time_steps(
        parts, prompts, group, short
    )  # touches its memory for the first time, which may take longer than to compute
    narrow_marks = _time_steps(parts, prompts[:narrow], 1, short)
    wide_marks = _time_steps(parts, prompts, group, short)
    limit = min(longest, max(short, int(SAMPLING_SECONDS / max(_step_seconds(wide_marks), 1e-6))))
    decode_step, decode_row = decode_costs(
        (wide_marks[0][0], _step_seconds(wide_marks)), (narrow_marks[0][0], _step_seconds(narrow_marks))
    )
    drawing = settings or _plain(group)
    if isinstance(drawing, GRFT) and judged_elsewhere(drawing):
        drawing = drawing.model_copy(update={"survivor": "sample"})  # which asks for no scores
    began = time.perf_counter()
    trees, _ = draw(parts, drawing, prompts, step=0, max_new_tokens=limit)
    drawing_seconds = time.perf_counter() - began
    rate = config.grading.max_failure_rate
    with GradingBeside(parts.grader, parts.encoder.decode) as beside:
        began = time.perf_counter()
        grades = beside.grades(trees, max_failure_rate=rate)
        grade = (time.perf_counter() - began) / sum(len(own) for own in grades)
        critiques = _try_critic(parts, settings, trees, grades)
    endings = [(tree, leaf) for tree in trees for leaf in tree.endings()]
    unfinished = [tree.nodes[leaf].stop is StopReason.LENGTH for tree, leaf in endings]
    capped = limit < longest
    lengths = [
        longest if late else tree.completion_length(leaf)
        for (tree, leaf), late in zip(endings, unfinished, strict=True)
    ]
    grown = None
    if isinstance(drawing, OnTrees):
        more = longest / limit
        grown = GrownTree(
            tokens=more * sum(tree.sampled_tokens for tree in trees) / len(trees),
            seconds=more * drawing_seconds / len(trees),
            paths=sum(len(own) for own in grades) / len(trees),
        )
    groups, with_signal = _signal(trees, grades, settings)
    return TriedSampling(
        trees=trees,
        tried=Tried(
            lengths,
            read_share_of(parts, trees),
            grown,
            critiques,
            groups=groups,
            groups_with_signal=with_signal,
        ),
        cut_off=sum(unfinished) if capped else 0,
        truncated=0 if capped else sum(unfinished),
        call=Sampling(len(prompts), group, mean_prompt(prompts), lengths),
        prefill_token=wide_marks[0][1] / sum(len(prompt.tokens) for prompt in prompts),
        decode_step=decode_step,
        decode_row=decode_row,
        hand_over=hand_over,
        grade=grade,
    )


def _plain(group_size: int) -> Sampled:
    """Whole completions, where the algorithm draws none of its own."""
    return Sampled(group_size=group_size)


def _signal(
    trees: Sequence[Tree], grades: Sequence[Mapping[int, Grade]], settings: Sampled | None
) -> tuple[int, int]:
    """Groups of whole completions, and how many of them have different scores. Those of candidates are compared by
    scores that are not taken here: none."""
    if settings is None or isinstance(settings, OnTrees):
        return 0, 0
    return len(trees), sum(has_signal(own) for own in grades)


def _try_critic(
    parts: Parts,
    settings: Sampled | None,
    trees: Sequence[Tree],
    grades: Sequence[Mapping[int, Grade]],
) -> Critiques:
    """What the critic takes for a prompt. A judge is not asked."""
    if parts.critic is None or settings is None or judged_elsewhere(settings):
        return Critiques()
    few, rate = min(len(trees), CRITICISED_TREES), parts.config.grading.max_failure_rate
    began = time.perf_counter()
    _, _, found = criticise(parts.critic, settings, trees[:few], grades[:few], max_failure_rate=rate)
    tokens = sum(critique.sampled_tokens for own in found for critique in own.values())
    return Critiques((time.perf_counter() - began) / few, tokens / few)


Marks = Sequence[tuple[int, float]]
"""After each step of the engine: tokens drawn so far, seconds since the call began."""


def _time_steps(parts: Parts, prompts: Sequence[Prompt], group_size: int, max_new_tokens: int) -> Marks:
    assert parts.engine is not None
    marks: list[tuple[int, float]] = []
    began = time.perf_counter()
    grow_groups(
        parts.engine,
        prompts,
        group_size=group_size,
        sampling=replace(sampling_settings(parts.config.sampling), max_new_tokens=max_new_tokens),
        seed=parts.config.seed,
        purpose=Purpose.TRAIN,
        step=0,
        progress=lambda tokens: marks.append((tokens, time.perf_counter() - began)),
    )
    return marks


def decode_costs(wide: tuple[int, float], narrow: tuple[int, float]) -> tuple[float, float]:
    """(cost of a step, cost of a row in it) from the times of a wide and a narrow step.

    time = step + rows * row; neither is negative.

    Args:
        wide: rows and seconds.
        narrow: the same of a step with fewer rows, or as many.
    """
    if wide[0] == narrow[0]:
        return wide[1], 0.0
    row = min(max(0.0, (wide[1] - narrow[1]) / (wide[0] - narrow[0])), wide[1] / wide[0])
    return wide[1] - row * wide[0], row


def _step_seconds(marks: Marks) -> float:
    """Time of a decoding step in which every row still grows: the median over those."""
    widest = marks[0][0]
    times = [after[1] - before[1] for before, after in pairwise(marks) if after[0] - before[0] == widest]
    return median(times) if times else 0.0


def mean_prompt(prompts: Sequence[Prompt]) -> float:
    return sum(len(prompt.tokens) for prompt in prompts) / len(prompts)
