"""Parts that the sections of several algorithms are made of. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from graft.section import Section


class Clip(Section):
    """How far the probability ratio may move before the gradient stops."""

    low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio may fall to `1 - low`."""

    high: float = Field(default=0.2, ge=0)
    """The ratio may rise to `1 + high`."""


class TokenClip(Clip):
    """How far the probability ratio of a token may move before the gradient stops."""

    dual: float | None = Field(default=None, gt=1)
    """Dual clip: with a negative advantage the loss is at most `dual` times it, whatever the ratio. None: off."""


Estimator = Literal["k1", "k2", "k3", "exact"]


class KL(Section):
    """Penalty for leaving the anchor."""

    coefficient: float = Field(default=0.0, ge=0)
    """β, the weight of the penalty. At 0 it does not train and costs nothing."""

    place: Literal["loss", "reward"] = "loss"
    """In the loss of every token, or subtracted from the reward of every token."""

    estimator: Estimator = "k3"
    """Which estimate of a token's KL enters; see `objective/kl.py` for bias and gradient of each. `k1` belongs in the
    reward, and is the default there: in the loss its gradient is zero on average. `exact` sums over the vocabulary and
    belongs in the loss; it holds the anchor's last hidden state of every token while the batch trains."""

    anchor: Literal["initial", "rollout"] = "initial"
    """The model that training started with, or the policy that sampled the batch, which needs no copy of the weights.
    From that the policy is away only after its first update, or where older weights sampled."""

    @model_validator(mode="before")
    @classmethod
    def _k1_in_the_reward(cls, data: Any) -> Any:
        """k1 is the estimate whose gradient is right in the reward, k3 the default in the loss."""
        if isinstance(data, dict) and data.get("place") == "reward" and "estimator" not in data:
            return {**data, "estimator": "k1"}
        return data

    @model_validator(mode="after")
    def _k1_trains(self) -> KL:
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator = 'k1' in the loss trains nothing: its gradient has mean zero. Use 'k2', 'k3' or "
                "'exact', or kl.place = 'reward'."
            )
        return self

    @model_validator(mode="after")
    def _anchor_is_another(self) -> KL:
        if self.anchor == "rollout" and self.place == "reward":
            raise ValueError(
                'kl.anchor = "rollout": a reward is of the policy that sampled, whose KL to itself is 0; use '
                'kl.place = "loss", or "initial"'
            )
        return self

    @property
    def in_loss(self) -> bool:
        """Whether the penalty stands in the loss and trains."""
        return self.coefficient != 0 and self.place == "loss" and getattr(self, "of", "policy") == "policy"

    @property
    def in_reward(self) -> bool:
        """Whether the penalty is subtracted from rewards."""
        return self.coefficient != 0 and self.place == "reward"


class AdaptiveKL(KL):
    """Penalty for leaving the anchor, by default in the reward; its weight may follow a target."""

    place: Literal["loss", "reward"] = "reward"
    """In the loss of every token, or subtracted from the reward of every token."""

    estimator: Estimator = "k1"
    """Which estimate of a token's KL enters; see `objective/kl.py` for bias and gradient of each. `k1` belongs in the
    reward: in the loss its gradient is zero on average. `exact` sums over the vocabulary and belongs in the loss."""

    target: float | None = Field(default=None, gt=0)
    """KL of a completion (nats) that the weight is steered to; none: it stays at `coefficient`."""

    horizon: int = Field(default=10_000, ge=1)
    """Completions over which the weight follows the target."""

    @model_validator(mode="after")
    def _has_a_start(self) -> AdaptiveKL:
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                "kl.target needs kl.coefficient above 0: the weight is steered by factors from there"
            )
        if self.target is not None and self.place == "loss":
            raise ValueError(
                'kl.target steers the weight of a penalty in the reward: use kl.place = "reward", or leave it out'
            )
        if self.target is None and self.horizon != type(self).model_fields["horizon"].default:
            raise ValueError("kl.horizon: means nothing without kl.target; take it out, or set that")
        return self


class Entropy(Section):
    """Bonus for keeping the distribution wide."""

    coefficient: float = Field(default=0.0)
    """Weight of the entropy (nats a token) in the objective; positive keeps the policy random."""


class EarlyStopping(Section):
    """Ends supervised training when the loss on held-out rows falls no longer."""

    patience: int = Field(default=3, ge=1)
    """Measurements in a row without improvement after which training ends."""

    minimum_improvement: float = Field(default=0.0, ge=0)
    """Nats a token: a loss counts as improved when it is lower than the best so far by more than this."""


class Overlong(Section):
    """What becomes of completions that are too long."""

    buffer_share: float = Field(default=0.0, ge=0, le=1)
    """The reward falls in a line by up to 1 over the last such share of `sampling.max_new_tokens`. 0: no penalty."""

    mask: bool = False
    """Truncated completions do not train and leave the denominator; they still count in their group's baseline."""


class Value(Section):
    """The value model: a scalar head that predicts the reward to come."""

    trunk: Literal["shared", "separate"] = "shared"
    """`shared`: the head stands on the policy's last layer and both train it; `separate`: on a copy of the model."""

    coefficient: float = Field(default=0.1, ge=0)
    """c_1, the weight of the value loss."""

    clip: float = Field(default=0.2)
    """c_v: how far a value may move from the one at sampling before its gradient stops, in units of the reward;
    0 or less: no clipping."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the value model's own parameters; it follows `optimizer.schedule`."""

    update: Literal["joint", "after_policy"] = "joint"
    """`joint`: policy and value in one loss; `after_policy`: the value model is updated when all policy updates on the
    batch are done. That needs `trunk = "separate"`."""

    warmup_steps: int = Field(default=0, ge=0)
    """First steps of training in which only the value model's own parameters move. Their tokens count as all others."""

    @model_validator(mode="after")
    def _trunk_fits(self) -> Value:
        if self.update == "after_policy" and self.trunk == "shared":
            raise ValueError(
                'value.update = "after_policy" needs value.trunk = "separate": on a shared trunk the later value '
                "update would move the policy again"
            )
        return self


Reduction = Literal["sample_mean", "token_mean", "constant"]


class Sampled(Section):
    """What all algorithms have in common whose completions the engine draws."""

    group_size: int = Field(default=1, ge=1)
    """Samples for each prompt."""

    refresh_every: int = Field(default=1, ge=1)
    """Batches that are drawn with the same weights: the policy that samples, and the value model beside it, are brought
    up to date before each so many. Above 1 samples come from older weights, and the ratio is to those; a copy of what
    trains is kept in memory and in checkpoints."""

    kl: KL = KL()
    entropy: Entropy = Entropy()

    engine_weight_cap: float | None = Field(default=None, gt=0)
    """Cap of the truncated importance weight min(exp(old - engine), cap) on the policy loss; none: no weight."""

    @property
    def updates(self) -> int:
        """Optimiser steps on each batch of samples."""
        return getattr(self, "updates_per_batch", 1) * getattr(self, "minibatches", 1)


class Reused(Section):
    """Algorithms that may take several optimiser steps on one batch of samples."""

    updates_per_batch: int = Field(default=1, ge=1)
    """Passes over each batch of samples. 1, with one minibatch, is on-policy: the ratio is 1 and nothing is clipped."""

    minibatches: int = Field(default=1, ge=1)
    """Parts that a pass cuts the batch into, between prompts; each is an optimiser step."""
