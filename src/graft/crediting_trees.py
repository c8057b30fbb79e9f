"""GRFT: siblings of a tree are compared with each other, by a critic's scores, by outcomes, or by both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from graft.algorithm_settings import GRFT, ThoughtRewards
from graft.credit.group import group_relative_advantages, without_signal
from graft.credit.rewards import answer_reward, sibling_rewards
from graft.crediting import Evidence, StepCredit
from graft.crediting_facts import critic_facts
from graft.objective.reduce import tree_weights
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Critique, Grade

Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class ScoredNode:
    """A node that is compared with its siblings."""

    tree: int
    node: int
    depth: int
    """1 below the prompt."""

    score: float
    numbers: Numbers
    """What led to the score, for the report."""


def credit_siblings(evidence: Evidence, settings: GRFT) -> StepCredit:
    """Advantage of every node relative to the siblings of its group; every node counts once, whatever hangs below it.

    Groups whose scores are all equal have no gradient. They are left out of the network when nothing else in the loss
    needs them, but their nodes stay in the denominators.
    """
    nodes = [node for index in range(len(evidence.trees)) for node in scored_nodes(evidence, settings, index)]
    credits = [Credit({}, {}) for _ in evidence.trees]
    if not nodes:
        return StepCredit(credits, 0, 0, [0.0] * len(credits))
    siblings = [(n.tree, evidence.trees[n.tree].nodes[n.node].group) for n in nodes]
    numbering: dict[tuple[int, int, bool], int] = {}
    groups = torch.tensor(
        [
            numbering.setdefault((*group, apart(evidence.trees[n.tree], n.node, settings)), len(numbering))
            for group, n in zip(siblings, nodes, strict=True)
        ]
    )
    scores = torch.tensor([n.score for n in nodes], dtype=torch.float64)
    advantages = group_relative_advantages(scores, groups, scale=settings.scale)
    idle = without_signal(scores, groups)
    lengths = [len(evidence.trees[n.tree].nodes[n.node]) for n in nodes]
    prompts = sorted({n.tree for n in nodes})
    weights = tree_weights(
        torch.tensor(lengths),
        torch.tensor([n.tree for n in nodes]),
        torch.tensor([n.depth for n in nodes]),
        prompts_in_step=len(prompts),
    )
    needed_anyway = settings.kl.coefficient != 0 or settings.entropy.coefficient != 0
    details: list[dict[int, Numbers]] = [{} for _ in evidence.trees]
    for place, node in enumerate(nodes):
        details[node.tree][node.node] = {**node.numbers, "value": node.score, "A": float(advantages[place])}
        if needed_anyway or not idle[place]:
            credit, own = credits[node.tree], float(advantages[place])
            credit.advantages[node.node] = np.full(lengths[place], own, dtype=np.float32)  # pyright: ignore[reportIndexIssue]
            credit.weights[node.node] = np.full(lengths[place], float(weights[place]))  # pyright: ignore[reportIndexIssue]
    with_signal = {group for group, no_signal in zip(siblings, idle.tolist(), strict=True) if not no_signal}
    return StepCredit(
        credits,
        len(set(siblings)),
        len(with_signal),
        [float(index in prompts) for index in range(len(credits))],
        facts=_facts(evidence, nodes),
        details=details,
    )


def apart(tree: Tree, node: int, settings: GRFT) -> bool:
    """Whether a node is not compared with the thoughts among its siblings: it ends the completion, they go on."""
    return settings.compare == "separately" and settings.score != "outcome" and tree.ends(node)


def scored_nodes(evidence: Evidence, settings: GRFT, index: int) -> list[ScoredNode]:
    """The nodes of one tree that have a score, in the order of their ids."""
    tree, grades = evidence.trees[index], evidence.grades[index]
    by_critic: Mapping[int, tuple[float, Numbers]] = {}
    if settings.score != "outcome":
        by_critic = critic_scores(
            tree, grades, evidence.critiques[index], settings.rewards, scale=settings.critic.scale
        )
    by_outcome: Mapping[int, float] = {}
    if settings.score != "critic":
        by_outcome = (
            outcome_values(tree, grades)
            if settings.shape == "tree"
            else continued_values(tree, grades, evidence.critiques[index], scale=settings.critic.scale)
        )
    found = []
    for node in range(1, len(tree)):
        depth = len(tree.path(node)) - 1
        critic, outcome = by_critic.get(node), by_outcome.get(node)
        if settings.score == "critic" and critic is not None:
            found.append(ScoredNode(index, node, depth, *critic))
        elif settings.score == "outcome" and outcome is not None:
            found.append(ScoredNode(index, node, depth, outcome, {}))
        elif critic is not None and outcome is not None:
            share = settings.outcome_weight
            score = share * outcome + (1 - share) * critic[0]
            found.append(ScoredNode(index, node, depth, score, {**critic[1], "outcome": outcome}))
    return found


def outcome_values(tree: Tree, grades: Mapping[int, Grade]) -> dict[int, float]:
    """A leaf's value is its grade, a node's the mean of its children's; nodes without a graded leaf below have none."""
    values: dict[int, float] = {}
    for node in reversed(range(1, len(tree))):  # children have higher ids than their parents
        below = [values[child] for child in tree.children(node) if child in values]
        grade = grades.get(node)
        if below:
            values[node] = fmean(below)
        elif grade is not None and grade.score is not None and not tree.children(node):
            values[node] = float(grade.score)
    return values


def continued_values(
    tree: Tree, grades: Mapping[int, Grade], critiques: Mapping[int, Critique], *, scale: float
) -> dict[int, float]:
    """The same where most candidates have no leaves below: of a thought that goes on the share of its continuations
    that are solved, drawn by the critic `monte_carlo`; of a candidate that ends a completion its grade.

    Args:
        tree: with a critique for each leaf.
        grades: of the leaves that complete a sample.
        critiques: leaf -> critique, with P_k = B p_k.
        scale: B.
    """
    judged = _judged_thoughts(tree, critiques)
    values = {node: progress / scale for node, (_, progress) in judged.items() if not tree.ends(node)}
    return values | {leaf: float(own.score) for leaf, own in grades.items() if own.score is not None}


def critic_scores(
    tree: Tree,
    grades: Mapping[int, Grade],
    critiques: Mapping[int, Critique],
    rewards: ThoughtRewards,
    *,
    scale: float,
) -> dict[int, tuple[float, Numbers]]:
    """Ŝ + Q of thoughts that go on, ρ G of ends, with the numbers on the way; none where the critic failed.

    A completion that the token limit cut off ends in its last thought: its score is that of its grade, whatever the
    critic thinks of the lines in it.

    Args:
        tree: with a critique for each leaf; of a node that lies on several paths the first leaf's is taken.
        grades: of the leaves that complete a sample.
        critiques: leaf -> critique.
        rewards: settings.
        scale: B.
    """
    judged = _judged_thoughts(tree, critiques)
    scores: dict[int, tuple[float, Numbers]] = {}
    parents = dict.fromkeys(tree.nodes[node].parent for node in range(1, len(tree)))
    for parent in parents:
        thoughts = [child for child in tree.children(parent) if child in judged and not tree.ends(child)]
        past = [judged[node][1] for node in tree.path(parent) if node != ROOT and node in judged]
        if thoughts:
            own = sibling_rewards(
                torch.tensor([judged[node][0] for node in thoughts], dtype=torch.float64),
                torch.tensor([judged[node][1] for node in thoughts], dtype=torch.float64),
                torch.tensor(past, dtype=torch.float64),
                critic_scale=scale,
                **rewards.model_dump(exclude={"answer_scale"}),
            )
            for place, node in enumerate(thoughts):
                numbers = {
                    "S": judged[node][0],
                    "P": judged[node][1],
                    "Ŝ": float(own.standardised[place]),
                    "E": float(own.factor[place]),
                    "Q": float(own.effect[place]),
                }
                scores[node] = (float(own.rewards[place]), numbers)
        for child in tree.children(parent):
            critique = critiques.get(child)
            if not tree.ends(child) or critique is None or not critique.scored:
                continue
            if grades[child].score is not None:
                assert critique.overall is not None
                scores[child] = (answer_reward(critique.overall, answer_scale=rewards.answer_scale), {})
    return scores


def _judged_thoughts(tree: Tree, critiques: Mapping[int, Critique]) -> dict[int, tuple[float, float]]:
    """Thought -> its S and P."""
    judged: dict[int, tuple[float, float]] = {}
    for leaf, critique in critiques.items():
        if critique.scored:
            path = [node for node in tree.path(leaf)[1:] if tree.nodes[node].kind is Kind.THOUGHT]
            for node, own in zip(path, zip(critique.thoughts, critique.progress, strict=True), strict=True):
                judged.setdefault(node, own)
    return judged


def _facts(evidence: Evidence, nodes: Sequence[ScoredNode]) -> dict[str, float]:
    """Metrics of trees and critic."""
    trees = [tree for tree in evidence.trees if len(tree) > 1]
    facts = {
        "nodes_per_tree": fmean(len(tree) - 1 for tree in trees),
        "segments_per_completion": fmean(
            len(tree.path(leaf)) - 1 for tree in trees for leaf in tree.endings()
        ),
    }
    thoughts = [node.numbers for node in nodes if "S" in node.numbers]
    if thoughts:
        facts |= {
            "critic_thought_mean": fmean(own["S"] for own in thoughts),
            "critic_progress_mean": fmean(own["P"] for own in thoughts),
            "standardised_thought_mean": fmean(own["Ŝ"] for own in thoughts),
            "standardised_thought_absolute_mean": fmean(abs(own["Ŝ"]) for own in thoughts),
            "progress_effect_mean": fmean(own["Q"] for own in thoughts),
        }
    return facts | critic_facts(evidence)
