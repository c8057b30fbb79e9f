"""What settings silently take for granted of the grader's scores, where these do not lie between 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from graft.algorithm_settings import GRFT, RFT, ProcessGRPO
from graft.config import RunConfig
from graft.critics.settings import CriticSection
from graft.graders import grader_spec
from graft.grading.ranges import score_range
from graft.grading.schema import GraderSpec, ScoreModel

SLACK = 1e-9
"""Of sums of weights, which are rounded."""


def score_notes(config: RunConfig) -> list[str]:
    """A line for everything in the settings that does not fit the range of the scores.

    Raises:
        GraderError: the grader's file cannot be used.
    """
    if config.grader is None:
        return []
    spec = grader_spec(config.grader, Path(config.base))
    ends = score_range(spec)
    if ends is None:
        return []
    return [*_of_thresholds(config, spec, ends[1]), *_of_critic(config, *ends)]


def _of_thresholds(config: RunConfig, spec: GraderSpec, highest: float) -> Iterator[str]:
    solved_from = config.evaluation.threshold
    if "threshold" in config.evaluation.model_fields_set and solved_from == spec.pass_threshold:
        yield f"rows count as solved from a score of {solved_from:g}, the grader's pass_threshold"
    for name, section in (
        ("evaluation.threshold", config.evaluation),
        ("algorithm.critic.threshold", _critic(config)),
    ):
        threshold = getattr(section, "threshold", None)
        if threshold is None or section is None:
            continue
        if highest > threshold + SLACK and "threshold" not in section.model_fields_set:
            yield (
                f"scores go to {highest:g}, and everything from {threshold:g} counts as solved: set {name}"
                + (", or the grader's pass_threshold" if name.startswith("evaluation") else "")
            )
        if highest < threshold - SLACK and isinstance(spec, ScoreModel):
            yield f"scores go to {highest:g}, and {name} = {threshold:g}, so that nothing counts as solved: lower it"


def _of_critic(config: RunConfig, lowest: float, highest: float) -> Iterator[str]:
    """Where a critic's G is scale x score."""
    critic = _critic(config)
    outside = lowest < -SLACK or highest > 1 + SLACK
    if critic is None or not isinstance(config.algorithm, ProcessGRPO | RFT | GRFT) or not outside:
        return
    if getattr(critic, "overall", "grade") == "judge" or getattr(config.algorithm, "score", "") == "outcome":
        return
    above = "score" if lowest == 0 else f"(score {'-' if lowest > 0 else '+'} {abs(lowest):g})"
    scale = critic.scale
    yield (
        f"the critic's G is algorithm.critic.scale x score: from {scale * lowest:g} to {scale * highest:g}, where S "
        f"and P go from 0 to {scale:g}. Bring the scores to 0..1: make the grader a 'multi' (or change its formula) "
        f'with calculate_output = "{above} / {highest - lowest:g}"'
    )


def _critic(config: RunConfig) -> CriticSection | None:
    """The section of the critic that the algorithm asks."""
    asks = getattr(config.algorithm, "asks_critic", True)
    return getattr(config.algorithm, "critic", None) if asks else None
