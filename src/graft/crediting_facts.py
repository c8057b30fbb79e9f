"""What rows with a critic report of it: its scores, and whether it agrees with the grader."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from graft.crediting import Evidence, judged_completions


def completion_facts(evidence: Evidence) -> dict[str, float]:
    """Where completions are cut into chains: segments of a completion, and the critic's scores of thoughts. Empty where
    no completion has a grade and a critique."""
    judged = list(judged_completions(evidence))
    if not judged:
        return {}
    facts = {"segments_per_completion": fmean(len(nodes) for _, nodes, _ in judged)}
    thoughts = [score for *_, critique in judged for score in critique.thoughts]
    if thoughts:
        facts["critic_thought_mean"] = fmean(thoughts)
    return facts | critic_facts(evidence)


def critic_facts(evidence: Evidence) -> dict[str, float]:
    """The mean of G over the completions, and the correlation of their thoughts' mean score with their grade.

    On a tree a completion is a path to an ending; thoughts that paths share count for each of them. Empty without
    a critic.
    """
    if not evidence.critiques:
        return {}
    judged = [
        (critique, evidence.grades[tree][nodes[-1]].score)
        for tree, nodes, critique in judged_completions(evidence)
    ]
    facts = {}
    overall = [critique.overall for critique, _ in judged if critique.overall is not None]
    if overall:
        facts["critic_overall_mean"] = fmean(overall)
    pairs = [
        (fmean(critique.thoughts), float(score))
        for critique, score in judged
        if critique.thoughts and score is not None
    ]
    agreement = correlation([mean for mean, _ in pairs], [score for _, score in pairs])
    if agreement is not None:
        facts["critic_agreement"] = agreement
    return facts


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's, or None where one of them does not vary."""
    if len(one) < 2 or min(one) == max(one) or min(other) == max(other):
        return None
    return float(np.corrcoef(one, other)[0, 1])
