"""Trees and what is known about them -> credit: who is compared with whom, and with which weight each token trains.

Made of the pure functions in `credit/` and `objective/reduce.py`; the rows of `algorithms.py` name these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.algorithm_settings import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    KL,
    PPO,
    RLOO,
    SFT,
    DrGRPO,
    Grouped,
    Overlong,
    Reduction,
    Reinforce,
    Sampled,
    WholeSamples,
)
from graft.credit.gae import generalised_advantages, penalised_rewards
from graft.credit.group import group_relative_advantages, leave_one_out_advantages, without_signal
from graft.credit.length import overlong_penalty
from graft.credit.running_mean import RunningMean, running_mean_advantages
from graft.credit.whiten import whiten
from graft.objective.kl import ESTIMATORS, EXACT, adapted_coefficient
from graft.objective.reduce import constant_weights, sample_mean_weights, token_mean_weights
from graft.objective.value import explained_variance
from graft.tree import Tree
from graft.types import Appraisal, Credit, Critique, Grade, StopReason


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about the trees of one step when credit is given. One entry of each sequence a tree."""

    trees: Sequence[Tree]
    grades: Sequence[Mapping[int, Grade]] = ()
    """Leaf -> grade. Empty where rows bring worked completions."""

    critiques: Sequence[Mapping[int, Critique]] = ()
    """Leaf -> critique. Empty where the algorithm has no critic."""

    appraisals: Sequence[Appraisal] = ()
    """Empty where the algorithm's credit does not ask for them."""

    longest: int = 0
    """Tokens after which a completion is cut off, `sampling.max_new_tokens`."""

    carried: Mapping[str, float] = field(default_factory=dict)
    """What the last step's `StepCredit.carried` was; empty at the first step."""


@dataclass(frozen=True, slots=True)
class StepCredit:
    """Credit of all trees of one step, and what is worth reporting about it."""

    trees: Sequence[Credit]
    groups: int
    """Groups whose members were compared; 0 where the baseline is another."""

    groups_with_signal: int
    denominators: Sequence[float] = ()
    """What each tree adds to the denominator of the weights, in units of its own: when only some trees make an
    optimiser step, their weights are scaled by all / theirs."""

    carried: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the next step's credit starts from."""

    facts: Mapping[str, float] = field(default_factory=dict)
    """Metrics."""

    details: Sequence[Mapping[int, Mapping[str, float]]] = ()
    """For the report, one a tree: node -> the numbers on the way to its credit, by name."""


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """One sample with a score. Those without one have no part in anything."""

    tree: int
    group: int
    """Index among all groups of the step."""

    leaf: int
    score: float
    length: int
    """Tokens of the completion."""

    truncated: bool


def scored_samples(evidence: Evidence) -> list[ScoredSample]:
    """All samples of the step that have a score, tree by tree."""
    samples: list[ScoredSample] = []
    numbering: dict[tuple[int, int], int] = {}
    for index, (tree, grades) in enumerate(zip(evidence.trees, evidence.grades, strict=True)):
        for group in tree.groups():
            for leaf in tree.siblings(group):
                if (score := grades[leaf].score) is None:
                    continue
                samples.append(
                    ScoredSample(
                        tree=index,
                        group=numbering.setdefault((index, group), len(numbering)),
                        leaf=leaf,
                        score=float(score),
                        length=tree.completion_length(leaf),
                        truncated=tree.nodes[leaf].stop is StopReason.LENGTH,
                    )
                )
    return samples


def judged_completions(evidence: Evidence) -> Iterator[tuple[int, list[int], Critique]]:
    """Tree, segments and critique of every completion that has a grade and a critique, tree by tree. The others have no
    part in anything, nor have paths that were cut and not gone on with."""
    known = zip(evidence.trees, evidence.grades, evidence.critiques, strict=True)
    for index, (tree, grades, critiques) in enumerate(known):
        for leaf, critique in critiques.items():
            if leaf in grades and grades[leaf].score is not None and critique.scored:
                yield index, tree.path(leaf)[1:], critique


def credit_needs_appraisal(settings: Any) -> bool:
    """Whether the credit depends on what networks say of the tokens: on values, or on a KL in the reward."""
    if not isinstance(settings, Sampled):
        return False
    return hasattr(settings, "value") or settings.kl.in_reward


def credit_relative(evidence: Evidence, settings: GRPO | DAPO | GSPO | CISPO) -> StepCredit:
    """GRPO's advantage: relative to the group's mean."""

    def advantages_of(rewards: Tensor, groups: Tensor) -> Tensor:
        return group_relative_advantages(rewards, groups, scale=settings.scale)

    return credit_groups(evidence, settings, advantages_of)


def credit_centred(evidence: Evidence, settings: DrGRPO) -> StepCredit:
    """Dr. GRPO's: the distance to the group's mean, not divided by anything."""

    def advantages_of(rewards: Tensor, groups: Tensor) -> Tensor:
        return group_relative_advantages(rewards, groups, scale="none")

    return credit_groups(evidence, settings, advantages_of)


def credit_leave_one_out(evidence: Evidence, settings: RLOO) -> StepCredit:
    """RLOO's: the distance to the mean of the group's other samples."""
    return credit_groups(evidence, settings, leave_one_out_advantages)


def credit_groups(
    evidence: Evidence, settings: Grouped, advantages_of: Callable[[Tensor, Tensor], Tensor]
) -> StepCredit:
    """One advantage for each sample, from the rewards of all and the groups they stand in.

    A group whose rewards are all equal gets no gradient. It is left out of the network when nothing else in the
    loss needs it, but its samples stay in the denominator. Samples without a score leave both.

    Args:
        evidence: of the step.
        settings: of the algorithm.
        advantages_of: float64 rewards `[samples]` and group indices `[samples]` -> advantages `[samples]`.
    """
    samples = scored_samples(evidence)
    rewards = shaped_rewards(evidence, samples, settings)
    groups = torch.tensor([sample.group for sample in samples], dtype=torch.int64)
    idle = without_signal(rewards, groups)
    needed_anyway = settings.entropy.coefficient != 0 or settings.kl.in_loss
    left_out = torch.zeros_like(idle) if needed_anyway else idle
    credits, denominators = credit_whole_samples(
        evidence, samples, advantages_of(rewards, groups), settings, left_out=left_out.tolist()
    )
    number = len({sample.group for sample in samples})
    return StepCredit(credits, number, len(set(groups[~idle].tolist())), denominators)


def credit_running_mean(evidence: Evidence, settings: Reinforce) -> StepCredit:
    """REINFORCE's: the distance to the running mean of earlier steps' rewards."""
    samples = scored_samples(evidence)
    rewards = shaped_rewards(evidence, samples, settings)
    carried = RunningMean(
        evidence.carried.get("baseline_mean", 0.0), evidence.carried.get("baseline_weight", 0.0)
    )
    batch = running_mean_advantages(rewards, carried, decay=settings.baseline_decay)
    credits, denominators = credit_whole_samples(evidence, samples, batch.advantages, settings)
    return StepCredit(
        credits,
        0,  # nobody is compared within a group
        0,
        denominators,
        carried={"baseline_mean": batch.carried.mean, "baseline_weight": batch.carried.weight},
        facts={"reward_baseline": carried.mean} if carried.weight else {},
    )


def credit_values(evidence: Evidence, settings: PPO) -> StepCredit:
    """PPO's: generalised advantages of every token from the value model, with the score at the last token."""
    samples = scored_samples(evidence)
    coefficient = 0.0
    if settings.kl.in_reward:
        coefficient = evidence.carried.get("kl_coefficient", settings.kl.coefficient)
    scores = length_shaped_scores(evidence, samples, settings)
    sequences = []
    for sample, score in zip(samples, scores.tolist(), strict=True):
        rewards = penalised_rewards(
            score, kl_of_tokens(evidence, sample, settings.kl), coefficient=coefficient
        )
        values = torch.from_numpy(evidence.appraisals[sample.tree].old_values[sample.leaf]).double()
        sequences.append(
            generalised_advantages(rewards, values, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
        )
    trains = trained_samples(samples, settings.overlong)
    advantages = [own.advantages for own in sequences]
    if settings.whiten and sequences:
        kept = [own for own, train in zip(advantages, trains, strict=True) if train]
        lengths = [len(own) for own in kept]
        whitened = iter(whiten(torch.cat(kept), how="full").split(lengths)) if kept else iter(())
        advantages = [next(whitened) if train else own for own, train in zip(advantages, trains, strict=True)]
    weights, denominators = reduction_weights(evidence, samples, trains, settings.reduction)
    credits = [Credit({}, {}, {}, {}) for _ in evidence.trees]
    for sample, train, own, estimates, weight in zip(
        samples, trains, advantages, sequences, weights, strict=True
    ):
        if train:
            credit, node = credits[sample.tree], sample.leaf
            give(credit, node, own.numpy(), weight)
            give_target(credit, node, estimates.targets.numpy(), weight)
    carried, facts = _adapted(evidence, samples, settings, coefficient)
    targets = [own.targets for own in sequences]
    explained = (
        explained_variance(
            torch.cat([t - own.advantages for t, own in zip(targets, sequences, strict=True)]),
            torch.cat(targets),
        )
        if targets
        else None
    )
    if explained is not None:
        facts["value_explained_variance"] = explained
    return StepCredit(credits, 0, 0, denominators, carried, facts)


def _adapted(
    evidence: Evidence, samples: Sequence[ScoredSample], settings: PPO, coefficient: float
) -> tuple[dict[str, float], dict[str, float]]:
    """What is carried of the penalty's weight, and metrics."""
    if coefficient == 0 or not samples:
        return dict(evidence.carried), {}
    estimator = EXACT if settings.kl.estimator == EXACT else "k1"
    measured = sum(
        float(kl_of_tokens(evidence, sample, settings.kl, estimator=estimator).sum()) for sample in samples
    ) / len(samples)
    facts = {"kl_per_completion": measured}
    if settings.kl.target is None:
        return {}, facts
    facts["kl_coefficient"] = coefficient
    adapted = adapted_coefficient(
        coefficient,
        measured=measured,
        target=settings.kl.target,
        horizon=settings.kl.horizon,
        samples=len(samples),
    )
    return {"kl_coefficient": adapted}, facts


def credit_worked(evidence: Evidence, settings: SFT) -> StepCredit:
    """Every token of a worked completion counts; the reduction is the settings'."""
    samples = [
        ScoredSample(index, index, leaf, 1.0, len(tree.nodes[leaf]), truncated=False)
        for index, tree in enumerate(evidence.trees)
        for leaf in tree.leaves()
    ]
    weights, denominators = reduction_weights(evidence, samples, [True] * len(samples), settings.reduction)
    credits = [Credit({}, {}) for _ in evidence.trees]
    for sample, weight in zip(samples, weights, strict=True):
        give(credits[sample.tree], sample.leaf, np.ones(sample.length), weight)
    return StepCredit(credits, len(samples), len(samples), denominators)


def credit_whole_samples(
    evidence: Evidence,
    samples: Sequence[ScoredSample],
    advantages: Tensor,
    settings: WholeSamples,
    *,
    left_out: Sequence[bool] | None = None,
) -> tuple[list[Credit], list[float]]:
    """The same advantage for every token of a sample.

    Args:
        evidence: of the step.
        samples: those with a score.
        advantages: `[samples]`.
        settings: of the algorithm.
        left_out: samples that need not go through the network; they count in the denominator.

    Returns:
        credit of each tree, and what each adds to the denominator.
    """
    trains = trained_samples(samples, settings.overlong)
    weights, denominators = reduction_weights(evidence, samples, trains, settings.reduction)
    skipped = left_out if left_out is not None else [False] * len(samples)
    credits = [Credit({}, {}) for _ in evidence.trees]
    for sample, train, skip, advantage, weight in zip(
        samples, trains, skipped, advantages.tolist(), weights, strict=True
    ):
        if train and not skip:
            give(credits[sample.tree], sample.leaf, np.full(sample.length, advantage), weight)
    return credits, denominators


def trained_samples(samples: Sequence[ScoredSample], overlong: Overlong) -> list[bool]:
    """Which samples train: all but, where they are masked, the truncated ones."""
    return [not (overlong.mask and sample.truncated) for sample in samples]


def shaped_rewards(evidence: Evidence, samples: Sequence[ScoredSample], settings: WholeSamples) -> Tensor:
    """Score minus the penalty on length, minus β times the completion's KL where that stands in the reward.

    Returns:
        float64 `[samples]`.
    """
    rewards = length_shaped_scores(evidence, samples, settings)
    if settings.kl.in_reward:
        penalties = [float(kl_of_tokens(evidence, sample, settings.kl).sum()) for sample in samples]
        rewards = rewards - settings.kl.coefficient * torch.tensor(penalties, dtype=torch.float64)
    return rewards


def length_shaped_scores(
    evidence: Evidence, samples: Sequence[ScoredSample], settings: WholeSamples
) -> Tensor:
    """Score minus the penalty on length: float64 `[samples]`."""
    scores = torch.tensor([sample.score for sample in samples], dtype=torch.float64)
    buffer = round(settings.overlong.buffer_share * evidence.longest)
    if not buffer:
        return scores
    lengths = torch.tensor([sample.length for sample in samples], dtype=torch.int64)
    return scores + overlong_penalty(lengths, max_new_tokens=evidence.longest, buffer=buffer)


def kl_of_tokens(evidence: Evidence, sample: ScoredSample, kl: KL, *, estimator: str | None = None) -> Tensor:
    """KL of the policy that sampled to the anchor at each token, nats, float64; 0 where nothing is penalised in the
    reward."""
    appraisal = evidence.appraisals[sample.tree]
    if sample.leaf not in appraisal.anchor_logprobs:
        return torch.zeros(sample.length, dtype=torch.float64)
    if (estimator or kl.estimator) == EXACT:
        return torch.from_numpy(appraisal.kl[sample.leaf]).double()
    old = torch.from_numpy(appraisal.old_logprobs[sample.leaf]).double()
    anchor = torch.from_numpy(appraisal.anchor_logprobs[sample.leaf]).double()
    return ESTIMATORS[estimator or kl.estimator](old, anchor)


def reduction_weights(
    evidence: Evidence, samples: Sequence[ScoredSample], trains: Sequence[bool], reduction: Reduction
) -> tuple[list[float], list[float]]:
    """The weight of each sample's tokens (0: it does not train), and what each tree adds to the denominator."""
    own = [sample for sample, train in zip(samples, trains, strict=True) if train]
    denominators = [0.0] * len(evidence.trees)
    for sample in own:
        denominators[sample.tree] += sample.length if reduction == "token_mean" else 1
    lengths = torch.tensor([sample.length for sample in own], dtype=torch.int64)
    if reduction == "token_mean":
        weights = token_mean_weights(lengths, tokens_in_step=int(lengths.sum()))
    elif reduction == "constant":
        weights = constant_weights(lengths, samples_in_step=len(own), max_new_tokens=evidence.longest)
    else:
        weights = sample_mean_weights(lengths, samples_in_step=len(own))
    given = iter(weights.tolist())
    return [next(given) if train else 0.0 for train in trains], denominators


def give(credit: Credit, node: int, advantages: np.ndarray, weight: float) -> None:
    """Train a node's tokens with these advantages, all with the same weight."""
    credit.advantages[node] = advantages.astype(np.float32)  # pyright: ignore[reportIndexIssue]
    credit.weights[node] = np.full(len(advantages), weight)  # pyright: ignore[reportIndexIssue]


def give_target(credit: Credit, node: int, targets: np.ndarray, weight: float) -> None:
    """Train the values of the states before a node's tokens towards these targets."""
    credit.value_targets[node] = targets.astype(np.float32)  # pyright: ignore[reportIndexIssue]
    credit.value_weights[node] = np.full(len(targets), weight)  # pyright: ignore[reportIndexIssue]
