"""Advantages from a value function, over the tokens of a completion or the segments of a chain. Pure tensors.

A step is one token (PPO) or one segment (RFT): r_k is its reward and V(s_k) the value of the state before it. The
state after the last step has value 0, `value_after`, also where the token limit cut the completion off: the limit is
part of the task, and the grade is of what was written. To bootstrap instead, pass the value of the last state.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Estimates(NamedTuple):
    """What `generalised_advantages` returns, each `[steps]`, without gradient."""

    advantages: Tensor
    """A_k = Y_k - V(s_k)."""

    targets: Tensor
    """Y_k, what V(s_k) should have been: the value loss's target. Not whitened when the advantages are."""


def generalised_advantages(
    rewards: Float[Tensor, " steps"],
    values: Float[Tensor, " steps"],
    *,
    gamma: float,
    gae_lambda: float,
    value_after: float = 0.0,
) -> Estimates:
    """GAE(γ, λ) of one sequence, by the λ-return:

        Y_k = r_k + γ ((1 - λ) V(s_{k+1}) + λ Y_{k+1}),    A_k = Y_k - V(s_k)

    which is Σ_l (γλ)^l δ_{k+l} with δ_k = r_k + γ V(s_{k+1}) - V(s_k). λ = 1 is the plain return minus V, and
    λ = 0 the deck's one-step A_k = r_k + γ V(s_{k+1}) - V(s_k).

    Args:
        rewards: r_k of each step.
        values: V(s_k), in the rewards' unit, from the weights that sampled.
        gamma: γ, the discount a step, 0 to 1.
        gae_lambda: GAE's λ, 0 to 1; not the deck's λ.
        value_after: value of the state after the last step, and the return that goes on from there.

    Sources: GAE, arXiv:1506.02438, eq. 16; the deck, "Introduction to GRPO" (A_t) and "Chain-of-Thought RFT
    Objective" (Y_k, there with λ = 0).
    """
    targets: list[float] = []
    next_value = next_target = value_after
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist()), strict=True):
        next_target = reward + gamma * ((1 - gae_lambda) * next_value + gae_lambda * next_target)
        next_value = value
        targets.append(next_target)
    target = rewards.new_tensor(targets[::-1])
    return Estimates(target - values.detach(), target)


def td_advantages(
    targets: Float[Tensor, " steps"], values: Float[Tensor, " steps"]
) -> Float[Tensor, " steps"]:
    """A_k = Y_k - V_θ(s_k) of the deck's RFT, with the value of the weights in training; no gradient.

    Before the first update V_θ is V_rollout, and this equals `generalised_advantages`; the deck recomputes it
    in each inner step.

    Args:
        targets: Y_k, from the rollout's values.
        values: V_θ(s_k) now.

    Source: the deck, "Chain-of-Thought RFT Objective".
    """
    return (targets - values).detach()


def penalised_rewards(
    score: float, kl: Float[Tensor, " tokens"], *, coefficient: float
) -> Float[Tensor, " tokens"]:
    """r_t = -β k1_t at each token of a completion, and the score on top of it at the last one.

    Args:
        score: the completion's grade.
        kl: log π_rollout - log π_ref of each sampled token, nats; at least one token.
        coefficient: β.

    Source: Ziegler et al., arXiv:1909.08593, eq. 2. The gradient of KL in the reward is the right one; see
    `objective/kl.py`.
    """
    rewards = -coefficient * kl.detach()
    rewards[-1] += score
    return rewards
