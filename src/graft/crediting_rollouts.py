"""VinePPO and SPO: values of states measured by rollouts, advantages from one state to the next.

VinePPO and SPO-chain draw rollouts for this alone (the critic `monte_carlo`); on a tree the leaves below a node are
its rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from graft.algorithm_rollouts import OfRollouts, SPOChain, SPOTree, VinePPO
from graft.credit.group import group_mean, group_relative_advantages, without_signal
from graft.credit.whiten import whiten
from graft.crediting import Evidence, StepCredit, judged_completions
from graft.crediting_trees import outcome_values
from graft.types import Credit, reaches


@dataclass(frozen=True, slots=True)
class ValuedNode:
    """A segment between two states with a value."""

    tree: int
    node: int
    advantage: float
    before: float
    """V of the state before it."""

    after: float
    """V of the state after it; after the last segment its reward."""


def credit_steps(evidence: Evidence, settings: VinePPO | SPOChain) -> StepCredit:
    """A_k = r_k + V(s_{k+1}) - V(s_k) of each segment of each completion, the same for all of its tokens.

    V is the share of continuations that are solved. Rewards are 0 but for the last segment's, which is 1 where the
    completion is solved; the state after it has the value 0. The critic draws nothing for a completion that is one
    answer: the prompt's value is that of its other completions, and where none has any, the advantage is 0.

    Sources: VinePPO, arXiv:2410.01679, and its code (`_compute_step_advantages`); SPO-chain, arXiv:2505.23564, with
    the same advantage of its segments.
    """
    found = []
    for index, nodes, critique in judged_completions(evidence):
        score = evidence.grades[index][nodes[-1]].score
        assert score is not None
        reward = float(reaches(score, settings.critic.threshold))
        starts = [own.initial_progress for own in evidence.critiques[index].values()]
        start = [value for value in starts if value is not None][:1]  # the prompt's is the same for all
        values = [value / settings.critic.scale for value in (*start, *critique.progress)] or [reward]
        ends = [*values[1 : len(nodes)], reward]
        found += [
            ValuedNode(index, node, after - before, before, after)
            for node, before, after in zip(nodes, values[: len(nodes)], ends, strict=True)
        ]
    return _give(evidence, found, settings, groups=(0, 0))


def credit_nodes(evidence: Evidence, settings: SPOTree) -> StepCredit:
    """A = V(s) - V(parent of s) of each node, V of a leaf its grade and of others the mean of their children's.

    Source: SPO-tree, arXiv:2505.23564.
    """
    nodes: list[tuple[int, int]] = []
    values: list[float] = []
    numbering: dict[tuple[int, int], int] = {}
    groups: list[int] = []
    for index, tree in enumerate(evidence.trees):
        for node, value in sorted(outcome_values(tree, evidence.grades[index]).items()):
            nodes.append((index, node))
            values.append(value)
            groups.append(numbering.setdefault((index, tree.nodes[node].group), len(numbering)))
    own, group = torch.tensor(values, dtype=torch.float64), torch.tensor(groups, dtype=torch.int64)
    advantages = group_relative_advantages(own, group, scale=settings.scale).tolist()
    found = [
        ValuedNode(*place, advantage, before, after)
        for place, advantage, before, after in zip(
            nodes, advantages, group_mean(own, group).tolist(), values, strict=True
        )
    ]
    with_signal = len(set(group[~without_signal(own, group)].tolist()))
    return _give(evidence, found, settings, groups=(len(numbering), with_signal))


def _give(
    evidence: Evidence, found: Sequence[ValuedNode], settings: OfRollouts, *, groups: tuple[int, int]
) -> StepCredit:
    """A mean over the trained tokens of the step, each node once; what the probability mask leaves out has no part."""
    masks = [_trained(evidence, each, settings) for each in found]
    counts = [int(mask.sum()) for mask in masks]
    tokens = sum(counts)
    trained = [place for place, count in enumerate(counts) if count]
    credits = [Credit({}, {}) for _ in evidence.trees]
    details: list[dict[int, dict[str, float]]] = [{} for _ in evidence.trees]
    denominators = [0.0] * len(evidence.trees)
    for each, count in zip(found, counts, strict=True):
        details[each.tree][each.node] = {"V": each.before, "value": each.after, "A": each.advantage}
        denominators[each.tree] += count
    advantages = whiten(
        torch.tensor([found[place].advantage for place in trained], dtype=torch.float64),
        how="full" if settings.whiten else "none",
        counts=torch.tensor([counts[place] for place in trained], dtype=torch.int64),
    ).tolist()
    for place, advantage in zip(trained, advantages, strict=True):
        each, mask = found[place], masks[place]
        credit = credits[each.tree]
        credit.advantages[each.node] = np.full(len(mask), advantage, dtype=np.float32)  # pyright: ignore[reportIndexIssue]
        credit.weights[each.node] = mask / tokens  # pyright: ignore[reportIndexIssue]
    return StepCredit(credits, *groups, denominators, details=details)


def _trained(evidence: Evidence, each: ValuedNode, settings: OfRollouts) -> np.ndarray:
    """Which tokens of a node train: bool `[tokens]`."""
    node = evidence.trees[each.tree].nodes[each.node]
    below = getattr(settings, "train_below", None)
    if below is None:
        return np.ones(len(node), dtype=bool)
    return np.exp(node.engine_logprobs.astype(np.float64)) < below
