"""Drawing, grading and criticising a few trees of a run, to see how long it takes and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from graft.algorithm_settings import GRFT, OnTrees, Sampled
from graft.algorithms import ALGORITHMS
from graft.assemble import Parts, sampling_settings
from graft.collect import has_signal
from graft.crediting import Evidence
from graft.drawing import criticise, draw
from graft.estimate import Critiques, GrownTree, Sampling, SamplingSpeeds, sampling_seconds
from graft.graders import judges_of
from graft.grading.beside import GradingBeside
from graft.model import plain_state
from graft.phases import Phase
from graft.rollout.grow import grow_groups
from graft.rollout.sampling import SamplingSettings
from graft.tree import Tree
from graft.trial_update import read_share_of, read_tokens
from graft.types import Grade, Prompt, Purpose, StopReason
from graft.workload import Tried, compares_alone, share_with_signal, side_by_side

SAMPLING_SECONDS = 12.0
"""About the longest time for sampling the trees; completions are cut off when they would take longer."""

SHORT_TOKENS = 8
"""Tokens of each completion in the two short samplings that time a decoding step."""

NARROWER = 8
"""How many times fewer rows the narrow one has."""

CRITICISED_TREES = 4
"""Most trees that the critic is tried on."""


@dataclass(frozen=True, slots=True)
class TriedSampling:
    """What a call of the engine showed."""

    trees: Sequence[Tree]
    tried: Tried
    speeds: SamplingSpeeds
    call: Sampling

    cut_off: int
    """Completions that were stopped by the limit of this measurement and not by the run's own."""

    truncated: int


def try_handing_over(parts: Parts) -> float:
    """Seconds to give the engine the policy's weights, once it has made room for them."""
    assert parts.engine is not None
    state = plain_state(parts.policy)
    parts.engine.load_weights(state, 0)
    began = time.perf_counter()
    parts.engine.load_weights(state, 0)
    return time.perf_counter() - began


def try_measuring(parts: Parts) -> TriedSampling:
    """Sample and grade held-out rows as a measurement does, as many as fill the engine; rows that train where there are
    no others."""
    config = parts.config
    rows = parts.held_out or parts.train
    call = _few(parts, rows, len(rows), config.evaluation.samples)
    sampling = sampling_settings(config.sampling, temperature=config.evaluation.temperature)
    speeds, limit = _try_steps(parts, call, sampling)
    began = time.perf_counter()
    trees = _grow(parts, call, replace(sampling, max_new_tokens=limit), Purpose.EVALUATION)
    seconds = time.perf_counter() - began
    grade, grades = _try_grading(parts, trees)
    return _tried(parts, call, trees, grades, None, replace(speeds, grade=grade), seconds, limit)


def try_sampling(parts: Parts, phase: Phase) -> TriedSampling:
    """Draw, grade and criticise trees for a step of the phase, as many as fill the engine."""
    config, settings = parts.config, phase.settings
    assert isinstance(settings, Sampled)
    call = _few(parts, parts.train, phase.rows_per_step, side_by_side(settings))
    speeds, limit = _try_steps(parts, call, sampling_settings(config.sampling))
    drawing = settings
    if isinstance(drawing, GRFT) and judged_elsewhere(drawing, Path(config.base)):
        drawing = drawing.model_copy(
            update={"survivor": "sample", "max_draws": 1}
        )  # which asks for no scores
    began = time.perf_counter()
    trees, _ = draw(parts, drawing, call.rows, step=0, max_new_tokens=limit)
    seconds = time.perf_counter() - began
    grade, grades = _try_grading(parts, trees)
    return _tried(parts, call, trees, grades, settings, replace(speeds, grade=grade), seconds, limit)


def judged_elsewhere(settings: object, base: Path) -> bool:
    """Whether a critic asks a judge, itself or through a grader, which a trial leaves alone."""
    critic = getattr(settings, "critic", None)
    kind = getattr(critic, "type", None)
    return kind == "judge" or (kind == "grader" and bool(judges_of(getattr(critic, "grader", None), base)))


@dataclass(frozen=True, slots=True)
class _Call:
    """Completions for some rows."""

    rows: Sequence[Prompt]
    samples: int

    def of(self, lengths: Sequence[int]) -> Sampling:
        """As counts; `lengths` in tokens."""
        return Sampling(len(self.rows), self.samples, mean_prompt(self.rows), lengths)


def _few(parts: Parts, rows: Sequence[Prompt], most: int, samples: int) -> _Call:
    """The first rows, as many as fill the engine, `most` of them at most."""
    available = rows[:most]
    slots = min(parts.config.rollout.slots, len(available) * samples)
    return _Call(available[: -(-slots // samples)], samples)


def _tried(
    parts: Parts,
    call: _Call,
    trees: Sequence[Tree],
    grades: Sequence[Mapping[int, Grade]],
    settings: Sampled | None,
    speeds: SamplingSpeeds,
    seconds: float,
    limit: int,
) -> TriedSampling:
    """What trees that took so long to draw show; `limit`: tokens at which they were cut off."""
    longest, slots = parts.config.sampling.max_new_tokens, parts.config.rollout.slots
    endings = [(tree, leaf) for tree in trees for leaf in tree.endings()]
    unfinished = [tree.nodes[leaf].stop is StopReason.LENGTH for tree, leaf in endings]
    capped = limit < longest
    drawn = [tree.completion_length(leaf) for tree, leaf in endings]
    lengths = [longest if late else own for own, late in zip(drawn, unfinished, strict=True)]
    grown = None
    if isinstance(settings, OnTrees):
        more = longest / limit
        grown = GrownTree(
            tokens=more * sum(tree.sampled_tokens for tree in trees) / len(trees),
            seconds=more * seconds / len(trees),
            paths=sum(len(own) for own in grades) / len(trees),
        )
    else:  # few steps show the shape, and the whole call the level: later tokens are shared by fewer samples
        speeds = speeds.scaled(seconds / sampling_seconds(call.of(drawn), speeds, slots=slots))
    groups, with_signal = _signal(trees, grades, settings)
    critiques, evidence = _try_critic(parts, settings, trees, grades)
    read_share = read_share_of(parts, trees)
    trained_share = 1.0 if settings is None else _trained_share(parts, settings, evidence)
    return TriedSampling(
        trees=trees,
        tried=Tried(
            lengths,
            read_share,
            grown,
            critiques,
            groups=groups,
            groups_with_signal=with_signal,
            trained_share=trained_share,
        ),
        speeds=speeds,
        call=call.of(lengths),
        cut_off=sum(unfinished) if capped else 0,
        truncated=0 if capped else sum(unfinished),
    )


def _signal(
    trees: Sequence[Tree], grades: Sequence[Mapping[int, Grade]], settings: Sampled | None
) -> tuple[int, int]:
    """Groups of whole completions, and how many of them have different scores. Those of candidates are compared by
    scores that are not taken here: none."""
    if settings is None or isinstance(settings, OnTrees):
        return 0, 0
    return len(trees), sum(has_signal(own) for own in grades)


def _try_grading(parts: Parts, trees: Sequence[Tree]) -> tuple[float, list[Mapping[int, Grade]]]:
    """Seconds for a completion, and the grades."""
    assert parts.grader is not None
    with GradingBeside(parts.grader, parts.encoder.decode) as beside:
        began = time.perf_counter()
        grades = beside.grades(trees, max_failure_rate=parts.config.grading.max_failure_rate)
        return (time.perf_counter() - began) / sum(len(own) for own in grades), grades


def _try_critic(
    parts: Parts,
    settings: Sampled | None,
    trees: Sequence[Tree],
    grades: Sequence[Mapping[int, Grade]],
) -> tuple[Critiques, Evidence | None]:
    """What the critic takes for a prompt, and what credit is given by; None where that is a judge, who is not asked."""
    longest = parts.config.sampling.max_new_tokens
    if parts.critic is None or settings is None:
        return Critiques(), Evidence(trees, grades, longest=longest)
    if judged_elsewhere(settings, Path(parts.config.base)):
        return Critiques(), None
    few, rate = min(len(trees), CRITICISED_TREES), parts.config.grading.max_failure_rate
    began = time.perf_counter()
    trees, grades, found = criticise(parts.critic, settings, trees[:few], grades[:few], max_failure_rate=rate)
    tokens = sum(critique.sampled_tokens for own in found for critique in own.values())
    critiques = Critiques((time.perf_counter() - began) / few, tokens / few)
    return critiques, Evidence(trees, grades, found, longest=longest)


def _trained_share(parts: Parts, settings: Sampled, evidence: Evidence | None) -> float:
    """Share of the tokens that go through the network in an update: all, unless groups without signal stay out of it.
    Few trees were seen: one more that trains and one more that does not."""
    if evidence is None or not compares_alone(settings):
        return 1.0
    name: str = settings.name  # pyright: ignore[reportAttributeAccessIssue]
    credits = ALGORITHMS[name].credit(evidence, settings).trees
    count, (read, _) = len(evidence.trees), read_tokens(parts, evidence.trees)
    return share_with_signal(count, count * read_tokens(parts, evidence.trees, credits)[0] / read)


Marks = Sequence[tuple[int, float]]
"""After each step of the engine: tokens drawn so far, seconds since the call began."""


def _try_steps(parts: Parts, call: _Call, sampling: SamplingSettings) -> tuple[SamplingSpeeds, int]:
    """What the first tokens take, wide and narrow, and how many tokens there is time for."""
    longest = sampling.max_new_tokens
    short = min(SHORT_TOKENS, longest)
    narrow = _Call(call.rows[: max(1, len(call.rows) * call.samples // NARROWER)], 1)
    few = replace(sampling, max_new_tokens=short)
    _time_steps(parts, call, few)  # touches memory for the first time, which may take longer than to compute
    narrow_marks, wide_marks = _time_steps(parts, narrow, few), _time_steps(parts, call, few)
    step, row = decode_costs(
        (wide_marks[0][0], _step_seconds(wide_marks)), (narrow_marks[0][0], _step_seconds(narrow_marks))
    )
    prefill = wide_marks[0][1] / sum(len(prompt.tokens) for prompt in call.rows)
    limit = min(longest, max(short, int(SAMPLING_SECONDS / max(_step_seconds(wide_marks), 1e-6))))
    return SamplingSpeeds(prefill, step, row), limit


def _time_steps(parts: Parts, call: _Call, sampling: SamplingSettings) -> Marks:
    marks: list[tuple[int, float]] = []
    began = time.perf_counter()

    def mark(tokens: int) -> None:
        marks.append((tokens, time.perf_counter() - began))

    _grow(parts, call, sampling, Purpose.TRAIN, mark)
    return marks


def _grow(
    parts: Parts,
    call: _Call,
    sampling: SamplingSettings,
    purpose: Purpose,
    progress: Callable[[int], None] | None = None,
) -> list[Tree]:
    assert parts.engine is not None
    return grow_groups(
        parts.engine,
        call.rows,
        group_size=call.samples,
        sampling=sampling,
        seed=parts.config.seed,
        purpose=purpose,
        step=0,
        progress=progress,
    )


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
