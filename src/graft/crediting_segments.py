"""RFT and process GRPO: a critic's scores of the thoughts -> rewards and advantages of segments.

The deck, "Reward Processing" and "Chain-of-Thought RFT Objective"; the formulas are in `credit/rewards.py` and
`credit/gae.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from graft.algorithm_settings import RFT, ProcessGRPO, Rewards
from graft.credit.gae import generalised_advantages
from graft.credit.group import process_advantages, without_signal
from graft.credit.rewards import SegmentRewards, chain_rewards
from graft.credit.whiten import whiten
from graft.crediting import Evidence, ScoredSample, StepCredit, give, judged_completions, reduction_weights
from graft.crediting_facts import completion_facts
from graft.objective.reduce import segment_sum_weights
from graft.objective.value import explained_variance
from graft.tree import Kind
from graft.types import Credit, Critique


@dataclass(frozen=True, slots=True)
class JudgedChain:
    """A completion with a grade and a critique."""

    tree: int
    nodes: Sequence[int]
    """Its segments in order: thoughts, then the answer if there is one."""

    lengths: Sequence[int]
    """Tokens of each segment."""

    critique: Critique
    rewards: SegmentRewards
    values: Tensor
    """V_rollout of the state before each segment, float64."""


def credit_segments(evidence: Evidence, settings: RFT) -> StepCredit:
    """Target Y_k and advantage A_k of each segment, which all of its tokens share."""
    chains = judged_chains(evidence, settings)
    if not chains:
        return StepCredit([Credit({}, {}, {}, {}) for _ in evidence.trees], 0, 0, [0.0] * len(evidence.trees))
    sizes = [len(chain.nodes) for chain in chains]
    flat = torch.cat([chain.rewards.rewards for chain in chains])
    rewards = whiten(flat, how=settings.rewards.whiten).split(sizes)
    weights = segment_sum_weights(
        torch.tensor([n for chain in chains for n in chain.lengths]), completions_in_step=len(chains)
    ).split(sizes)
    credits = [Credit({}, {}, {}, {}) for _ in evidence.trees]
    details: list[dict[int, dict[str, float]]] = [{} for _ in evidence.trees]
    denominators = [0.0] * len(evidence.trees)
    estimates = [
        generalised_advantages(own, chain.values, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
        for chain, own in zip(chains, rewards, strict=True)
    ]
    targets = [own.targets for own in estimates]
    advantages = whiten(
        torch.cat([own.advantages for own in estimates]), how="full" if settings.whiten else "none"
    ).split(sizes)
    for place, chain in enumerate(chains):
        denominators[chain.tree] += 1
        credit = credits[chain.tree]
        for k, node in enumerate(chain.nodes):
            advantage, target = advantages[place][k], targets[place][k]
            _give(credit, node, chain.lengths[k], advantage, target, weights[place][k])
            details[chain.tree][node] = {
                **_numbers(chain, k),
                "R": float(rewards[place][k]),
                "V": float(chain.values[k]),
                "Y": float(target),
                "A": float(advantage),
            }
    facts = _facts(evidence, chains)
    explained = explained_variance(torch.cat([chain.values for chain in chains]), torch.cat(targets))
    if explained is not None:
        facts["value_explained_variance"] = explained
    return StepCredit(credits, 0, 0, denominators, facts=facts, details=details)


def credit_process(evidence: Evidence, settings: ProcessGRPO) -> StepCredit:
    """DeepSeekMath's process supervision: S_k rewards a thought, G the answer.

    Groups whose step rewards are all equal have no gradient and are left out where nothing else needs them.
    """
    steps: list[tuple[int, int, float]] = []  # tree, node, reward
    owners: list[int] = []
    samples: list[tuple[int, int, list[int]]] = []  # tree, group, nodes
    for index, nodes, critique in judged_completions(evidence):
        assert critique.overall is not None
        rewards = [*critique.thoughts, critique.overall][: len(nodes)]
        steps += [(index, node, reward) for node, reward in zip(nodes, rewards, strict=True)]
        owners += [len(samples)] * len(nodes)
        samples.append((index, evidence.trees[index].nodes[nodes[0]].group, nodes))
    numbering = {key: i for i, key in enumerate(dict.fromkeys((tree, group) for tree, group, _ in samples))}
    groups = torch.tensor([numbering[samples[owner][:2]] for owner in owners], dtype=torch.int64)
    rewards = torch.tensor([reward for *_, reward in steps], dtype=torch.float64)
    advantages = process_advantages(
        rewards, torch.tensor(owners, dtype=torch.int64), groups, scale=settings.scale
    ).tolist()
    idle = without_signal(rewards, groups)
    scored = [
        ScoredSample(
            tree, numbering[tree, group], nodes[-1], 0.0, _tokens(evidence, tree, nodes), truncated=False
        )
        for tree, group, nodes in samples
    ]
    weights, denominators = reduction_weights(evidence, scored, [True] * len(scored), settings.reduction)
    needed_anyway = settings.kl.coefficient != 0 or settings.entropy.coefficient != 0
    credits = [Credit({}, {}) for _ in evidence.trees]
    details: list[dict[int, dict[str, float]]] = [{} for _ in evidence.trees]
    for (tree, node, reward), owner, advantage, no_signal in zip(
        steps, owners, advantages, idle.tolist(), strict=True
    ):
        details[tree][node] = {"R": reward, "A": advantage}
        if needed_anyway or not no_signal:
            length = len(evidence.trees[tree].nodes[node])
            give(credits[tree], node, np.full(length, advantage), weights[owner])
    with_signal = len(set(groups[~idle].tolist()))
    return StepCredit(
        credits, len(numbering), with_signal, denominators, facts=completion_facts(evidence), details=details
    )


def _tokens(evidence: Evidence, tree: int, nodes: Sequence[int]) -> int:
    return sum(len(evidence.trees[tree].nodes[node]) for node in nodes)


def judged_chains(evidence: Evidence, settings: RFT) -> list[JudgedChain]:
    """All completions that have a grade and a critique, with their rewards before whitening."""
    chains = []
    for index, nodes, critique in judged_completions(evidence):
        tree, values = evidence.trees[index], evidence.appraisals[index].old_values
        chains.append(
            JudgedChain(
                tree=index,
                nodes=nodes,
                lengths=[len(tree.nodes[node]) for node in nodes],
                critique=critique,
                rewards=process(
                    critique,
                    settings.rewards,
                    scale=settings.critic.scale,
                    answered=tree.nodes[nodes[-1]].kind is Kind.ANSWER,
                ),
                values=torch.tensor([float(values[node][0]) for node in nodes], dtype=torch.float64),
            )
        )
    return chains


def process(critique: Critique, rewards: Rewards, *, scale: float, answered: bool) -> SegmentRewards:
    """The deck's reward processing of one completion, in float64."""
    assert critique.overall is not None
    return chain_rewards(
        torch.tensor(critique.thoughts, dtype=torch.float64),
        torch.tensor(critique.progress, dtype=torch.float64),
        float(critique.overall),
        answered=answered,
        critic_scale=scale,
        **rewards.model_dump(exclude={"whiten"}),
    )


def _give(credit: Credit, node: int, length: int, advantage: Tensor, target: Tensor, weight: Tensor) -> None:
    """Every token of a segment trains with the segment's advantage; its value is that of its first state."""
    first = np.zeros(length)
    first[0] = 1.0
    credit.advantages[node] = np.full(length, float(advantage), dtype=np.float32)  # pyright: ignore[reportIndexIssue]
    credit.weights[node] = np.full(length, float(weight))  # pyright: ignore[reportIndexIssue]
    credit.value_targets[node] = np.full(length, float(target), dtype=np.float32)  # pyright: ignore[reportIndexIssue]
    credit.value_weights[node] = first * float(weight) * length  # pyright: ignore[reportIndexIssue]


def _numbers(chain: JudgedChain, k: int) -> dict[str, float]:
    """S, P and what they became, of segment k; the answer has none of them."""
    if k >= len(chain.critique.thoughts):
        return {}
    own = chain.rewards
    return {
        "S": float(chain.critique.thoughts[k]),
        "P": float(chain.critique.progress[k]),
        "Ŝ": float(own.standardised[k]),
        "E": float(own.factor[k]),
        "Q": float(own.effect[k]),
        "C": float(own.combined[k]),
    }


def _facts(evidence: Evidence, chains: Sequence[JudgedChain]) -> dict[str, float]:
    """Metrics of segments and critic."""
    facts = completion_facts(evidence)
    thoughts = [chain for chain in chains if chain.critique.thoughts]
    if thoughts:
        standardised = torch.cat([c.rewards.standardised for c in thoughts])
        facts |= {
            "critic_progress_mean": fmean(p for c in thoughts for p in c.critique.progress),
            "standardised_thought_mean": fmean(standardised.tolist()),
            "standardised_thought_absolute_mean": fmean(standardised.abs().tolist()),
            "progress_effect_mean": fmean(torch.cat([c.rewards.effect for c in thoughts]).tolist()),
        }
    return facts
