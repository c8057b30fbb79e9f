"""From a critic's scores to segment rewards: the deck's "Reward Processing", one function for each formula.

| deck | here | settings it takes |
|------|------|-------------------|
| μ_S, σ_S, Ŝ_k = (S_k - μ_S) / σ_S | `z_scores` | `std_epsilon` ε_std |
| Ŝ_k <- α Ŝ_k or δ Ŝ_k | `boost_or_dampen` | `boost` α, `dampen` δ |
| P̄_k | `progress_baseline` | `progress_window` W |
| ΔP_k = P_k - P̄_k | `progress_change` | |
| E_k | `progress_factor` | `progress_gain` κ⁺, `progress_loss` κ⁻, `critic_scale` B |
| m_k = S_k / λ | `thought_multiplier` | `thought_divisor` λ |
| Q_k = E_k m_k | `progress_effect` | |
| C_k = G + Ŝ_k + Q_k | `combined_scores` | `overall` |
| (C_k - μ_C) / σ_C | `z_scores` | `normalise`, `std_epsilon` |
| α_1, α_2 | `clip_to_answer` | `floor_multiplier` α_1, `ceiling_offset` α_2 |
| R_{M+1} = ρ G | `answer_reward` | `answer_scale` ρ |

`thought_rewards` puts those of Ŝ and Q together, `chain_rewards` all of them for a completion, `sibling_rewards` for
the candidates of one GRFT group; they keep every intermediate number. Whitening over the rollout batch comes after, in
`whiten.py`.

All scores are finite and lie in 0..B. What the formulas then do, wanted or not:

- With all else fixed R rises with G, Ŝ_k rises with S_k, and ΔP_k > 0 gives Q_k >= 0.
- ΔP_k < 0 makes Q_k = E_k S_k / λ the more negative the *higher* S_k is; a step back with S_k = 0 costs nothing.
- ΔP_1 = 0, so that a higher P_1 earns nothing and lowers the rewards of the segments that follow.
- P̄ lags: a segment without progress after one with progress still gets ΔP > 0.
- G stands in every C_k: the sum of the rewards grows with the number of segments.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

Segments = Float[Tensor, " segments"]
"""One number for each segment of a chain, in order, or for each sibling of a group."""


class SegmentRewards(NamedTuple):
    """Rewards and every number on the way to them; each `[segments]` but where said."""

    standardised: Tensor
    """Ŝ_k, boosted or dampened."""

    baseline: Tensor
    """P̄_k, score."""

    change: Tensor
    """ΔP_k, score."""

    factor: Tensor
    """E_k."""

    multiplier: Tensor
    """m_k."""

    effect: Tensor
    """Q_k."""

    combined: Tensor
    """C_k, before normalising and clipping; of a thought among siblings Ŝ + Q."""

    rewards: Tensor
    """R_k; of a chain with an answer `[segments + 1]`, the answer's reward last."""


class ThoughtConstants(TypedDict):
    """What the formulas of Ŝ and Q take besides scores and window."""

    std_epsilon: float
    """ε_std, score²."""

    boost: float
    """α."""

    dampen: float
    """δ."""

    progress_gain: float
    """κ⁺, score."""

    progress_loss: float
    """κ⁻, score."""

    critic_scale: float
    """B."""

    thought_divisor: float
    """λ, score."""


def z_scores(scores: Segments, *, std_epsilon: float) -> Segments:
    """(S_k - μ_S) / σ_S with σ_S = sqrt(mean((S - μ_S)²) + ε_std). A single score gives 0.

    Args:
        scores: S_1..S_M, or C_1..C_M where the combined scores are normalised.
        std_epsilon: ε_std, above 0, in squared units of the scores. It stands inside the root.
    """
    if scores.numel() == 0:
        return scores
    centred = scores - scores.mean()
    return centred / ((centred**2).mean() + std_epsilon).sqrt()


def boost_or_dampen(standardised: Segments, *, boost: float, dampen: float) -> Segments:
    """α Ŝ_k where Ŝ_k >= 0, δ Ŝ_k where Ŝ_k < 0."""
    return torch.where(standardised >= 0, boost * standardised, dampen * standardised)


def progress_baseline(progress: Segments, *, window: int) -> Segments:
    """P̄_k, the mean of the last min(W, k - 1) progress scores before segment k; P̄_1 = P_1.

    Args:
        progress: P_1..P_M.
        window: W, at least 1.
    """
    means = [_mean(progress[max(0, k - window) : k]) for k in range(1, len(progress))]
    return torch.stack([progress[0], *means]) if len(progress) else progress


def _mean(scores: Segments) -> Float[Tensor, ""]:
    """The mean, exactly the last score where all are equal: the root in E would magnify a rounding error."""
    return scores[-1] + (scores - scores[-1]).mean()


def progress_change(progress: Segments, baseline: Segments) -> Segments:
    """ΔP_k = P_k - P̄_k."""
    return progress - baseline


def progress_factor(
    change: Segments, progress: Segments, *, progress_gain: float, progress_loss: float, critic_scale: float
) -> Segments:
    """E_k = sqrt(ΔP_k) P_k / κ⁺ where ΔP_k > 0, -log(1 + |ΔP_k|) (B - P_k) / κ⁻ where ΔP_k < 0, else 0.

    Args:
        change: ΔP_k.
        progress: P_k.
        progress_gain: κ⁺, score.
        progress_loss: κ⁻, score.
        critic_scale: B, the top of the critic's scale.
    """
    gained = change.clamp(min=0).sqrt() * progress / progress_gain
    lost = -torch.log1p((-change).clamp(min=0)) * (critic_scale - progress) / progress_loss
    return gained.where(change > 0, lost.where(change < 0, 0.0))


def thought_multiplier(scores: Segments, *, thought_divisor: float) -> Segments:
    """m_k = S_k / λ."""
    return scores / thought_divisor


def progress_effect(factor: Segments, multiplier: Segments) -> Segments:
    """Q_k = E_k m_k."""
    return factor * multiplier


def combined_scores(
    overall_score: float, standardised: Segments, effect: Segments, *, overall: str
) -> Segments:
    """C_k = G + Ŝ_k + Q_k.

    Args:
        overall_score: G.
        standardised: Ŝ_k after boost and dampen.
        effect: Q_k.
        overall: `every_segment` adds G to each segment (the deck), `shared` adds G / M to each.
    """
    if overall == "every_segment":
        share = overall_score
    elif overall == "shared":
        share = overall_score / max(len(effect), 1)
    else:
        raise ValueError(f"overall = {overall!r}: want 'every_segment' or 'shared'")
    return share + standardised + effect


def answer_reward(overall_score: float, *, answer_scale: float) -> float:
    """R_{M+1} = ρ G."""
    return answer_scale * overall_score


def clip_to_answer(
    combined: Segments, answer: float, *, floor_multiplier: float | None, ceiling_offset: float | None
) -> Segments:
    """clip(C_k, α_1 ρ G, ρ G + α_2); None leaves a side open, and the ceiling wins where it is below the floor.

    The deck names α_1 ("multiplier to cap the minimum segment score") and α_2 ("additive offset to cap the maximum")
    without a formula; this one is ours. With G = 0 a floor pays every segment of a wrong answer at least 0.

    Args:
        combined: C_k.
        answer: ρ G.
        floor_multiplier: α_1.
        ceiling_offset: α_2, score.
    """
    if floor_multiplier is not None:
        combined = combined.clamp(min=floor_multiplier * answer)
    if ceiling_offset is not None:
        combined = combined.clamp(max=answer + ceiling_offset)
    return combined


def thought_rewards(
    scores: Segments, progress: Segments, baseline: Segments, **constants: Unpack[ThoughtConstants]
) -> SegmentRewards:
    """Ŝ + Q of the thoughts of a chain, or of siblings, with the numbers on the way.

    Args:
        scores: S of each thought; the z-score runs over them.
        progress: P of each.
        baseline: P̄ of each.
        **constants: of the formulas.
    """
    standardised = boost_or_dampen(
        z_scores(scores, std_epsilon=constants["std_epsilon"]),
        boost=constants["boost"],
        dampen=constants["dampen"],
    )
    change = progress_change(progress, baseline)
    factor = progress_factor(
        change,
        progress,
        progress_gain=constants["progress_gain"],
        progress_loss=constants["progress_loss"],
        critic_scale=constants["critic_scale"],
    )
    multiplier = thought_multiplier(scores, thought_divisor=constants["thought_divisor"])
    effect = progress_effect(factor, multiplier)
    earned = standardised + effect
    return SegmentRewards(standardised, baseline, change, factor, multiplier, effect, earned, earned)


def chain_rewards(
    scores: Segments,
    progress: Segments,
    overall_score: float,
    *,
    answered: bool,
    progress_window: int,
    overall: str,
    normalise: bool,
    answer_scale: float,
    floor_multiplier: float | None,
    ceiling_offset: float | None,
    **constants: Unpack[ThoughtConstants],
) -> SegmentRewards:
    """R_1..R_M of the thoughts of one completion and R_{M+1} of its answer.

    Args:
        scores: S_1..S_M, the critic's thought scores; M may be 0.
        progress: P_1..P_M, the critic's progress scores.
        overall_score: G, the critic's overall score.
        answered: whether the completion has an answer segment; a truncated one has none, and no R_{M+1}.
        progress_window: W, segments.
        overall: `every_segment` or `shared`.
        normalise: z-score the combined scores over the chain (deck: "if required"); this takes G out of them.
        answer_scale: ρ.
        floor_multiplier: α_1 or None.
        ceiling_offset: α_2 or None, score.
        **constants: of the formulas of Ŝ and Q.

    Source: the deck, "Reward Processing". Sharing G and the clip's formula are ours.
    """
    own = thought_rewards(scores, progress, progress_baseline(progress, window=progress_window), **constants)
    combined = combined_scores(overall_score, own.standardised, own.effect, overall=overall)
    answer = answer_reward(overall_score, answer_scale=answer_scale)
    thoughts = clip_to_answer(
        z_scores(combined, std_epsilon=constants["std_epsilon"]) if normalise else combined,
        answer,
        floor_multiplier=floor_multiplier,
        ceiling_offset=ceiling_offset,
    )
    rewards = torch.cat([thoughts, thoughts.new_tensor([answer])]) if answered else thoughts
    return own._replace(combined=combined, rewards=rewards)


def sibling_rewards(
    scores: Segments,
    progress: Segments,
    past_progress: Float[Tensor, " depth"],
    *,
    progress_window: int,
    **constants: Unpack[ThoughtConstants],
) -> SegmentRewards:
    """Score of each candidate thought that continues one prefix: Ŝ + Q, without G and without a clip.

    The z-score runs over the siblings instead of over a chain, and P̄ is that of the prefix, the same for all; with
    no thought before them each is its own baseline, so that ΔP = 0. An answer among the candidates is no thought:
    it gets `answer_reward` and stays out of the z-score.

    Args:
        scores: S of each sibling.
        progress: P of each sibling.
        past_progress: P of the thoughts before them, first to last.
        progress_window: W, segments.
        **constants: of the formulas of Ŝ and Q.

    Source: ours, from the deck's "Reinforcement Fine-Tuning v2 (GRFT)": each prefix is a question of GRPO.
    """
    past = past_progress[-progress_window:]
    baseline = _mean(past).expand_as(progress) if len(past) else progress
    return thought_rewards(scores, progress, baseline, **constants)
