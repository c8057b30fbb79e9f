"""Measuring a policy on held-out rows: accuracy, pass@k and their intervals, with the run's own engine and grader."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from graft.grading.beside import GradingBeside
from graft.rollout.engine import Engine
from graft.rollout.grow import grow_groups
from graft.rollout.sampling import SamplingSettings
from graft.tree import Tree
from graft.types import Grade, Grader, Prompt, Purpose, StopReason, Tokens, reaches

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured."""

    accuracy: Estimate
    """Share of samples that solve their row: pass@1."""

    pass_at: Mapping[int, Estimate]
    """k -> chance that at least one of k samples solves the row; k is 1, 2, 4, ... up to the number of samples."""

    reward_mean: float
    length_mean: float
    """Tokens."""

    truncated_share: float
    failed: int
    """Samples that could not be graded."""

    rows: int
    generated_tokens: int
    trees: Sequence[Tree]
    grades: Sequence[Mapping[int, Grade]]


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader,
    decode: Callable[[Tokens], str],
    *,
    samples: int,
    sampling: SamplingSettings,
    threshold: float,
    seed: int,
    max_failure_rate: float,
    progress: Callable[[int], None] | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sample every prompt `samples` times and grade.

    The random streams do not depend on when it is measured: the same weights give the same samples. Samples
    without a score are left out of the means and counted. `waiting` is called now and then while grades are missing; it
    raises if the user wants to stop.

    Raises:
        GraderError: more than `max_failure_rate` of the samples could not be graded.
    """
    with GradingBeside(grader, decode) as beside:
        trees = grow_groups(
            engine,
            prompts,
            group_size=samples,
            sampling=sampling,
            seed=seed,
            purpose=Purpose.EVALUATION,
            step=0,
            progress=progress,
            finished=beside.finished(prompts),
        )
        grades = beside.grades(trees, max_failure_rate=max_failure_rate, waiting=waiting)
    scores = [[g.score for g in own.values() if g.score is not None] for own in grades]
    solved = [(len(own), sum(reaches(score, threshold) for score in own)) for own in scores if own]
    lengths = [tree.completion_length(leaf) for tree in trees for leaf in tree.leaves()]
    stops = [tree.nodes[leaf].stop for tree in trees for leaf in tree.leaves()]
    flat = [score for own in scores for score in own]
    return Evaluation(
        accuracy=estimate([right / drawn for drawn, right in solved]),
        pass_at={
            k: estimate([pass_at_k(drawn, right, k) for drawn, right in solved if drawn >= k])
            for k in _powers_of_two(samples)
            if any(drawn >= k for drawn, _ in solved)
        },
        reward_mean=sum(flat) / len(flat) if flat else math.nan,
        length_mean=sum(lengths) / len(lengths),
        truncated_share=sum(stop is StopReason.LENGTH for stop in stops) / len(stops),
        failed=sum(grade.failed for own in grades for grade in own.values()),
        rows=len(prompts),
        generated_tokens=sum(lengths),
        trees=trees,
        grades=grades,
    )


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """Chance that k of `drawn` samples, taken without replacement, hold at least one of the `right` ones.

    1 - C(drawn - right, k) / C(drawn, k), unbiased for the chance that k fresh samples solve the row.
    Source: Chen et al., arXiv:2107.03374, eq. 1.
    """
    if not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {drawn}")
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of one value a row, with a 95 % interval over rows.

    Wilson's interval where every value is 0 or 1; else mean ± 1.96 standard errors (N - 1), within [0, 1]:
    samples of one row are not independent, rows are.
    """
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, math.nan)
    mean = math.fsum(values) / count
    if all(value in (0, 1) for value in values):
        centre = (mean + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
        half = Z95 / (1 + Z95**2 / count) * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
    else:
        variance = math.fsum((v - mean) ** 2 for v in values) / max(count - 1, 1)
        centre, half = mean, Z95 * math.sqrt(variance / count)
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half))


def _powers_of_two(limit: int) -> list[int]:
    powers = [1]
    while powers[-1] * 2 <= limit:
        powers.append(powers[-1] * 2)
    return powers if powers[-1] == limit else [*powers, limit]
