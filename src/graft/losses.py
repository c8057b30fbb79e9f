"""Per-token losses of the table's rows, made of `objective/`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graft.algorithm_parts import Clip, TokenClip
from graft.algorithm_rollouts import OfRollouts
from graft.algorithm_settings import (
    CISPO,
    DAPO,
    GRFT,
    GRPO,
    GSPO,
    PPO,
    RFT,
    RLOO,
    SFT,
    DrGRPO,
    ProcessGRPO,
    Reinforce,
    Sampled,
)
from graft.credit.gae import td_advantages
from graft.objective.clip import ClippedLoss, cispo_loss, clipped_policy_loss, truncated_importance_weight
from graft.objective.kl import ESTIMATORS, EXACT


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What the loss of a micro-batch sees of its N trained tokens; all `[N]`, log-probabilities in nats."""

    logprobs: Tensor  # carries the gradient
    entropies: Tensor
    old_logprobs: Tensor
    engine_logprobs: Tensor
    anchor_logprobs: Tensor | None
    advantages: Tensor
    nodes: Tensor  # index of each token's node, 0 to number of nodes - 1
    values: Tensor | None = None  # of the state before each token, now; no gradient
    value_targets: Tensor | None = None
    kl: Tensor | None = None  # to the anchor, over the whole vocabulary; carries the gradient


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Per-token loss to be minimised `[N]`, and facts to be averaged for the report."""

    per_token: Tensor
    facts: Mapping[str, Tensor]


def loss_clipped(
    tokens: TokenBatch, settings: GRPO | DrGRPO | DAPO | RLOO | PPO | ProcessGRPO | OfRollouts
) -> TokenLoss:
    """Clipped surrogate with the ratio of each token."""
    return _with_regularisers(_clipped(tokens, settings.clip), tokens, settings)


def loss_clipped_sequence(tokens: TokenBatch, settings: GSPO) -> TokenLoss:
    """Clipped surrogate with one ratio for each completion, the geometric mean of its tokens'."""
    return _with_regularisers(_clipped(tokens, settings.clip, ratio="segment_mean"), tokens, settings)


def loss_weighted(tokens: TokenBatch, settings: CISPO) -> TokenLoss:
    """Log-probability times advantage, times a capped importance weight."""
    capped = cispo_loss(tokens.logprobs, tokens.old_logprobs, tokens.advantages, cap=settings.weight_cap)
    return _with_regularisers(capped, tokens, settings)


def loss_reinforce(tokens: TokenBatch, settings: Reinforce) -> TokenLoss:
    """-ρ A log π of each token, no gradient through its ratio ρ, which is 1 unless older weights sampled."""
    weighted = cispo_loss(tokens.logprobs, tokens.old_logprobs, tokens.advantages, cap=math.inf)
    return TokenLoss(_with_regularisers(weighted, tokens, settings).per_token, {})


def loss_segments(tokens: TokenBatch, settings: RFT) -> TokenLoss:
    """Clipped surrogate with the ratio of each segment; with the deck's one-step target the advantage is taken from
    the value in training, unless the batch's advantages were whitened."""
    advantages = tokens.advantages
    firsts = first_tokens(tokens.nodes)
    anew = settings.gae_lambda == 0 and not settings.whiten
    if anew and tokens.values is not None and tokens.value_targets is not None:
        own = td_advantages(tokens.value_targets[firsts], tokens.values[firsts])
        advantages = own.index_select(0, tokens.nodes)
    clipped = _clipped(replace(tokens, advantages=advantages), settings.clip, ratio=settings.ratio)
    # a token weighs 1/N_k of its segment, and the deck's penalty is a sum over the segment's tokens
    loss = _with_regularisers(clipped, tokens, settings, times=node_lengths(tokens.nodes))
    return _with_segments_clipped(loss, clipped, tokens.nodes, settings.ratio)


def loss_nodes(tokens: TokenBatch, settings: GRFT) -> TokenLoss:
    """Clipped surrogate with the ratio of each token or of each node."""
    clipped = _clipped(tokens, settings.clip, ratio=settings.ratio)
    loss = _with_regularisers(clipped, tokens, settings)
    return _with_segments_clipped(loss, clipped, tokens.nodes, settings.ratio)


def _with_segments_clipped(loss: TokenLoss, clipped: ClippedLoss, nodes: Tensor, ratio: str) -> TokenLoss:
    """Counts segments that the clip stopped, where a segment has one ratio: all of its tokens are stopped, or none."""
    if ratio == "token":
        return loss
    share = clipped.was_clipped[first_tokens(nodes)].float()
    return TokenLoss(loss.per_token, {**loss.facts, "segments_clipped_share": share})


def _clipped(tokens: TokenBatch, clip: Clip, *, ratio: str = "token") -> ClippedLoss:
    return clipped_policy_loss(
        tokens.logprobs,
        tokens.old_logprobs,
        tokens.advantages,
        clip_low=clip.low,
        clip_high=clip.high,
        ratio=ratio,
        nodes=tokens.nodes,
        dual_clip=clip.dual if isinstance(clip, TokenClip) else None,
    )


def node_lengths(nodes: Tensor) -> Tensor:
    """Tokens of each token's node: `[N]` -> float `[N]`."""
    return nodes.bincount().to(torch.get_default_dtype()).index_select(0, nodes)


def first_tokens(nodes: Tensor) -> Tensor:
    """Index of the first token of each node: `[N]` -> `[nodes]`."""
    return (nodes.diff(prepend=nodes.new_tensor([-1])) != 0).nonzero()[:, 0]


def loss_cross_entropy(tokens: TokenBatch, settings: SFT) -> TokenLoss:
    """-log π of each token of the worked completion."""
    return TokenLoss(-tokens.logprobs, {})


def _with_regularisers(
    loss: ClippedLoss, tokens: TokenBatch, settings: Sampled, *, times: Tensor | float = 1.0
) -> TokenLoss:
    """The policy loss times the engine's weight, plus β KL (where it stands in the loss), minus the entropy bonus.

    Args:
        loss: of the policy.
        tokens: of the micro-batch.
        settings: of the algorithm.
        times: what multiplies penalty and bonus of each token.
    """
    per_token = loss.per_token
    if settings.engine_weight_cap is not None:
        per_token = per_token * truncated_importance_weight(
            tokens.old_logprobs, tokens.engine_logprobs, cap=settings.engine_weight_cap
        )
    if settings.kl.in_loss:
        per_token = per_token + settings.kl.coefficient * times * _kl(tokens, settings.kl.estimator)
    if settings.entropy.coefficient:
        per_token = per_token - settings.entropy.coefficient * times * tokens.entropies
    return TokenLoss(per_token, {"clipped_share": loss.was_clipped.float()})


def _kl(tokens: TokenBatch, estimator: str) -> Tensor:
    if estimator == EXACT:
        assert tokens.kl is not None
        return tokens.kl
    assert tokens.anchor_logprobs is not None
    return ESTIMATORS[estimator](tokens.logprobs, tokens.anchor_logprobs)
