"""The table of algorithms. A row says how credit is given and which loss it enters; the loop knows no names.

Rows take records and give records (`credit`), or tensors and give tensors (`loss`); both are made of the pure
functions in `credit/` and `objective/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.config import GRPO, SFT
from graft.credit.group import group_relative_advantages, without_signal
from graft.objective.clip import clipped_policy_loss, truncated_importance_weight
from graft.objective.kl import ESTIMATORS
from graft.objective.reduce import sample_mean_weights, token_mean_weights
from graft.tree import Tree
from graft.types import Credit, Grade


@dataclass(frozen=True, slots=True)
class StepCredit:
    """Credit of all trees of one optimiser step, and what is worth reporting about it."""

    trees: Sequence[Credit]
    groups: int
    groups_with_signal: int


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the loss of a micro-batch sees of its N trained tokens; all `[N]`, log-probabilities in nats."""

    logprobs: Tensor  # carries the gradient
    entropies: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    anchor_logprobs: Tensor | None
    advantages: Tensor


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token loss to be minimised `[N]`, and per-token facts to be averaged for the report."""

    per_token: Tensor
    facts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table. `settings` is the algorithm's section of the configuration."""

    samples: bool
    """Whether the engine draws completions and a grader scores them; otherwise rows bring worked completions."""

    credit: Callable[[Sequence[Tree], Sequence[Mapping[int, Grade]], Any], StepCredit]
    loss: Callable[[TokenBatch, Any], TokenLoss]


def credit_group(trees: Sequence[Tree], grades: Sequence[Mapping[int, Grade]], settings: GRPO) -> StepCredit:
    """Group-relative advantage for every token of a completion, reduced by the mean over samples.

    A group whose scores are all equal gets no gradient. It is left out of the network when nothing else in the
    loss needs it, but its samples stay in the denominator. Samples without a score leave both.
    """
    scored = [
        (index, group, leaf, float(grade.score))
        for index, (tree, own) in enumerate(zip(trees, grades, strict=True))
        for group in tree.groups()
        for leaf in tree.siblings(group)
        if (grade := own[leaf]).score is not None
    ]
    numbering = {
        key: i for i, key in enumerate(dict.fromkeys((index, group) for index, group, _, _ in scored))
    }
    if not scored:
        return StepCredit([Credit({}, {}) for _ in trees], 0, 0)
    groups = torch.tensor([numbering[index, group] for index, group, _, _ in scored])
    scores = torch.tensor([score for *_, score in scored], dtype=torch.float64)
    lengths = torch.tensor([len(trees[index].nodes[leaf]) for index, _, leaf, _ in scored])
    advantages = group_relative_advantages(scores, groups, scale=settings.scale)
    weights = sample_mean_weights(lengths, samples_in_step=len(scored))
    idle = without_signal(scores, groups)
    needed_anyway = settings.kl.coefficient != 0 or settings.entropy.coefficient != 0
    credits = [Credit({}, {}) for _ in trees]
    for place, (index, _, leaf, _) in enumerate(scored):
        if needed_anyway or not idle[place]:
            _give(credits[index], leaf, int(lengths[place]), float(advantages[place]), float(weights[place]))
    with_signal = len(numbering) - len(set(groups[idle].tolist()))
    return StepCredit(credits, len(numbering), with_signal)


def credit_worked(trees: Sequence[Tree], grades: Sequence[Mapping[int, Grade]], settings: SFT) -> StepCredit:
    """Every token of a worked completion counts; the reduction is the settings'."""
    leaves = [(index, leaf) for index, tree in enumerate(trees) for leaf in tree.leaves()]
    lengths = torch.tensor([len(trees[index].nodes[leaf]) for index, leaf in leaves])
    if settings.reduction == "token_mean":
        weights = token_mean_weights(lengths, tokens_in_step=int(lengths.sum()))
    else:
        weights = sample_mean_weights(lengths, samples_in_step=len(leaves))
    credits = [Credit({}, {}) for _ in trees]
    for (index, leaf), length, weight in zip(leaves, lengths.tolist(), weights.tolist(), strict=True):
        _give(credits[index], leaf, length, 1.0, weight)
    return StepCredit(credits, len(leaves), len(leaves))


def _give(credit: Credit, node: int, length: int, advantage: float, weight: float) -> None:
    credit.advantages[node] = np.full(length, advantage, dtype=np.float32)  # pyright: ignore[reportIndexIssue]
    credit.weights[node] = np.full(length, weight, dtype=np.float64)  # pyright: ignore[reportIndexIssue]


def loss_clipped(tokens: TokenBatch, settings: GRPO) -> TokenLoss:
    """Clipped surrogate with token ratio, plus β KL minus the entropy bonus."""
    clipped = clipped_policy_loss(
        tokens.logprobs,
        tokens.old_logprobs,
        tokens.advantages,
        clip_low=settings.clip.low,
        clip_high=settings.clip.high,
    )
    per_token = clipped.per_token
    if settings.engine_weight_cap is not None:
        per_token = per_token * truncated_importance_weight(
            tokens.old_logprobs, tokens.engine_logprobs, cap=settings.engine_weight_cap
        )
    if settings.kl.coefficient and tokens.anchor_logprobs is not None:
        penalty = ESTIMATORS[settings.kl.estimator](tokens.logprobs, tokens.anchor_logprobs)
        per_token = per_token + settings.kl.coefficient * penalty
    if settings.entropy.coefficient:
        per_token = per_token - settings.entropy.coefficient * tokens.entropies
    return TokenLoss(per_token, {"clipped_share": clipped.was_clipped.float()})


def loss_cross_entropy(tokens: TokenBatch, settings: SFT) -> TokenLoss:
    """-log π of each token of the worked completion."""
    return TokenLoss(-tokens.logprobs, {})


ALGORITHMS: Mapping[str, Algorithm] = {
    "grpo": Algorithm(samples=True, credit=credit_group, loss=loss_clipped),
    "sft": Algorithm(samples=False, credit=credit_worked, loss=loss_cross_entropy),
}
