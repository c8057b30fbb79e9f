"""`[algorithm]`: one section class for each row of the table, made of shared parts. Imports no torch.

A class holds what means something to its algorithm and nothing else, so every other key is unknown there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from graft.algorithm_parts import (
    KL,
    AdaptiveKL,
    Clip,
    EarlyStopping,
    Overlong,
    Reduction,
    Reused,
    Sampled,
    TokenClip,
    Value,
)
from graft.algorithm_rollouts import SPOChain, SPOTree, VinePPO
from graft.critics.settings import CriticSettings, Equations
from graft.section import Section
from graft.segments.settings import Segments


class WholeSamples(Sampled):
    """Algorithms that score completions as a whole."""

    reduction: Reduction = "sample_mean"
    """From token losses to one number: `sample_mean` (mean over the tokens of a sample, then over samples),
    `token_mean` (over all trained tokens of the step), `constant` (sum over tokens divided by
    `sampling.max_new_tokens`, then mean over samples)."""

    overlong: Overlong = Overlong()


class Grouped(WholeSamples, Reused):
    """Algorithms whose baseline is the group."""

    group_size: int = Field(default=8, ge=2)
    """Samples for each prompt. One is not enough: the others are its baseline."""

    max_sampling_rounds: int = Field(default=1, ge=1)
    """Dynamic sampling: groups whose grades are all equal are replaced by fresh prompts, up to so many rounds of
    sampling a step. 1: off."""


class GRPO(Grouped):
    """Group relative policy optimisation: the group's mean reward is the baseline."""

    name: Literal["grpo"] = "grpo"

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divide advantages by the group's standard deviation, the batch's, or not at all."""

    clip: TokenClip = TokenClip()


class DrGRPO(Grouped):
    """GRPO done right: no division by the standard deviation, a constant denominator (arXiv:2503.20783)."""

    name: Literal["dr_grpo"] = "dr_grpo"

    reduction: Reduction = "constant"
    """As in `grpo`; `constant` is what takes the length bias away."""

    clip: TokenClip = TokenClip()


class DAPO(Grouped):
    """Decoupled clip and dynamic sampling (arXiv:2503.14476)."""

    name: Literal["dapo"] = "dapo"

    reduction: Reduction = "token_mean"
    """As in `grpo`; `token_mean` gives every token of the step the same weight."""

    max_sampling_rounds: int = Field(default=4, ge=1)
    """Dynamic sampling: groups whose grades are all equal are replaced by fresh prompts, up to so many rounds of
    sampling a step. 1: off."""

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divide advantages by the group's standard deviation, the batch's, or not at all."""

    clip: TokenClip = TokenClip(low=0.2, high=0.28)

    overlong: Overlong = Overlong(buffer_share=0.2)


class GSPO(Grouped):
    """Group sequence policy optimisation: one ratio a completion, the geometric mean of its tokens'
    (arXiv:2507.18071)."""

    name: Literal["gspo"] = "gspo"

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divide advantages by the group's standard deviation, the batch's, or not at all."""

    clip: Clip = Clip(low=3e-4, high=4e-4)


class CISPO(Grouped):
    """Clipped importance weights on the plain policy gradient: no token loses its gradient (arXiv:2506.13585)."""

    name: Literal["cispo"] = "cispo"

    reduction: Reduction = "token_mean"
    """As in `grpo`; `token_mean` gives every token of the step the same weight."""

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divide advantages by the group's standard deviation, the batch's, or not at all."""

    weight_cap: float = Field(default=5.0, ge=1)
    """The importance weight exp(now - old) of a token is at most this."""


class RLOO(Grouped):
    """REINFORCE with the mean of the group's other samples as baseline (arXiv:2402.14740)."""

    name: Literal["rloo"] = "rloo"

    clip: TokenClip = TokenClip()


class Reinforce(WholeSamples):
    """REINFORCE with a running mean of the rewards as baseline."""

    name: Literal["reinforce"] = "reinforce"

    baseline_decay: float = Field(default=0.9, ge=0, lt=1)
    """Share of the running mean that is left after a step."""


class PPO(WholeSamples, Reused):
    """Proximal policy optimisation with a value model."""

    name: Literal["ppo"] = "ppo"

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a token."""

    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation: 1 is the plain return, 0 the one-step advantage."""

    whiten: bool = True
    """Bring the advantages of the batch's tokens to mean 0 and standard deviation 1."""

    reduction: Reduction = "token_mean"
    """As in `grpo`."""

    clip: TokenClip = TokenClip()
    value: Value = Value()
    kl: AdaptiveKL = AdaptiveKL()  # pyright: ignore[reportIncompatibleVariableOverride] - settings are frozen


class ThoughtRewards(Section):
    """How the critic's scores of thoughts become rewards: the deck's symbols; formulas in `credit/rewards.py`."""

    std_epsilon: float = Field(default=1e-6, gt=0)
    """ε_std (score²): inside the root of a standard deviation."""

    boost: float = 1.0
    """α: multiplies Ŝ_k where it is 0 or more."""

    dampen: float = 0.5
    """δ: multiplies Ŝ_k where it is below 0."""

    progress_window: int = Field(default=3, ge=1)
    """W (segments): progress is compared with the mean of the last so many."""

    progress_gain: float = Field(default=10.0, gt=0)
    """κ⁺ (score): divides what progress earns."""

    progress_loss: float = Field(default=10.0, gt=0)
    """κ⁻ (score): divides what a step back costs."""

    thought_divisor: float = Field(default=10.0, gt=0)
    """λ (score): m_k = S_k / λ."""

    answer_scale: float = 1.0
    """ρ: the reward of the answer is ρ G."""


class Rewards(ThoughtRewards):
    """How the critic's scores become rewards of segments: the deck's symbols; formulas in `credit/rewards.py`."""

    overall: Literal["every_segment", "shared"] = "every_segment"
    """`every_segment`: G stands in every C_k, so that the sum of the rewards grows with the number of segments;
    `shared`: G / M in each."""

    floor_multiplier: float | None = None
    """α_1: C_k is at least α_1 ρ G. None: no floor. With G = 0 a floor pays every segment of a wrong answer."""

    ceiling_offset: float | None = None
    """α_2 (score): C_k is at most ρ G + α_2. None: no ceiling."""

    normalise: bool = False
    """Bring the C_k of each completion to mean 0 and standard deviation 1; this takes G out of them."""

    whiten: Literal["none", "scale", "full"] = "scale"
    """All R_k of the rollout batch: `scale` divides by their standard deviation; `full` also subtracts the mean, which
    pays or charges for every further segment."""


class PolicyKL(KL):
    """Penalty for leaving the anchor, in the loss of every token."""

    coefficient: float = Field(default=0.01, ge=0)
    """β, the weight of the penalty. At 0 it does not train and costs nothing."""

    place: Literal["loss"] = "loss"  # pyright: ignore[reportIncompatibleVariableOverride] - settings are frozen
    """Rewards are the critic's: the penalty stands in the loss."""

    of: Literal["policy", "rollout"] = "policy"
    """`policy`: KL of the policy in training to the anchor, the penalty that was meant; `rollout`: of the policy that
    sampled, as the deck prints it: reported, and without a gradient."""

    @model_validator(mode="after")
    def _reports_of_two(self) -> PolicyKL:
        if self.of == "rollout" and not self.coefficient:
            raise ValueError(
                'kl.of = "rollout" with kl.coefficient = 0: nothing would be reported; leave of out, or give a '
                "coefficient"
            )
        if self.of == "rollout" and self.estimator == "k2":
            raise ValueError(
                'kl.of = "rollout" is reported as "k3" or "exact"; set kl.estimator to one of them'
            )
        if self.of == self.anchor == "rollout":
            raise ValueError(
                'kl.of = "rollout" with kl.anchor = "rollout": the KL of the policy that sampled to itself is 0; set '
                "one of them to its default"
            )
        return self


def _narrow_clip(data: Any) -> Any:
    """A geometric mean of ratios stays near 1: its clip is 0.05 where none is given."""
    if isinstance(data, dict) and data.get("ratio") == "segment_mean" and "clip" not in data:
        return {**data, "clip": {"low": 0.05, "high": 0.05}}
    return data


class RFT(Sampled, Reused):
    """Reinforcement fine-tuning: a critic scores every thought, each segment is credited by a value model."""

    name: Literal["rft"] = "rft"

    segments: Segments = Segments()
    critic: CriticSettings = Equations()
    rewards: Rewards = Rewards()

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount a segment."""

    gae_lambda: float = Field(default=0.0, ge=0, le=1)
    """λ of generalised advantage estimation over segments: 0 is the deck's one-step target, with the advantage taken
    anew in every update from the value in training."""

    whiten: bool = False
    """Bring the advantages of the batch's segments to mean 0 and standard deviation 1, as PPO does with its tokens'; in
    every update they are then those at sampling. Without it all segments are pushed up while the value model is new."""

    ratio: Literal["segment", "segment_mean", "token"] = "segment"
    """`segment`: the product of the segment's token ratios, the deck's; `segment_mean`: their geometric mean (a
    gradient N_k times smaller; its clip is 0.05 where none is given); `token`: each token its own."""

    clip: TokenClip = TokenClip()
    value: Value = Value(coefficient=0.5)
    kl: PolicyKL = PolicyKL()  # pyright: ignore[reportIncompatibleVariableOverride] - settings are frozen

    _clip_of_means = model_validator(mode="before")(_narrow_clip)


class ProcessGRPO(Sampled, Reused):
    """GRPO with process supervision: a critic's scores of all steps of a group are normalised together, and a token's
    advantage is the sum over its own and the later steps (arXiv:2402.03300, section 4.1.3)."""

    name: Literal["process_grpo"] = "process_grpo"

    group_size: int = Field(default=8, ge=2)
    """Samples for each prompt. One is not enough: the others are its baseline."""

    reduction: Reduction = "sample_mean"
    """As in `grpo`."""

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divide step rewards by the standard deviation of the group's steps, of the batch's, or not at all."""

    segments: Segments = Segments()
    critic: CriticSettings = Equations()
    clip: TokenClip = TokenClip()

    @model_validator(mode="after")
    def _kl_stands_in_the_loss(self) -> ProcessGRPO:
        if self.kl.place == "reward":
            raise ValueError('kl.place = "reward": the rewards are those of steps; use "loss"')
        return self


class GRFT(Sampled, Reused):
    """Group relative reinforcement fine-tuning: a group of candidates at every prefix, no value model."""

    name: Literal["grft"] = "grft"

    shape: Literal["chain", "tree"] = "chain"
    """`chain`: each group has one survivor, from which the next group starts; `tree`: all candidates go on."""

    group_size: int = Field(default=4, ge=2)
    """`chain`: candidates at each prefix."""

    max_depth: int = Field(default=16, ge=1)
    """`chain`: groups at most. The candidates of the last are drawn to the end of the completion."""

    branching: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(4, 4, 4), min_length=1)
    """`tree`: candidates at each depth. Those of the last are drawn to the end of the completion."""

    survivor: Literal["sample", "best", "softmax"] = "sample"
    """`chain`: any candidate, so that paths are the policy's own; the best by score; or one drawn from a softmax of the
    scores. With the last two the paths are no longer distributed as the policy's."""

    survivor_temperature: float = Field(default=1.0, gt=0)
    """Of that softmax, in units of the score."""

    max_draws: int = Field(default=1, ge=1)
    """Draws of a group at most: one whose candidates all have the same score is drawn anew from the same prefix; the
    tokens count as generated. 1: off. Needs `score = "critic"` and a critic that can judge while trees grow."""

    score: Literal["critic", "outcome", "mixed"] = "critic"
    """What siblings are compared by: `critic`: Ŝ + Q of thoughts and ρ G of ends; `outcome`: the mean grade of the
    leaves below, in a `chain` the share of solved continuations, which `critic.type = "monte_carlo"` draws, and the
    grade of an end; `mixed`: both."""

    compare: Literal["separately", "together"] = "separately"
    """Siblings that go on and siblings that end the completion: thoughts with thoughts and ends with ends, whose scores
    have other units, or all in one group, so that the scores also teach when to stop: `together` a true thought
    that gains nothing beats a wrong answer."""

    outcome_weight: float = Field(default=0.5, ge=0, le=1)
    """`mixed`: share of the outcome; the rest is the critic's."""

    scale: Literal["group_std", "batch_std", "none"] = "group_std"
    """Divide advantages by the standard deviation of the siblings, of the batch, or not at all."""

    segments: Segments = Segments()
    critic: CriticSettings = Equations()
    rewards: ThoughtRewards = ThoughtRewards()

    ratio: Literal["token", "segment_mean", "segment"] = "token"
    """Of each token; or one for each node: the geometric mean of its tokens' (its clip is 0.05 where none is given), or
    their product."""

    clip: TokenClip = TokenClip()

    _clip_of_means = model_validator(mode="before")(_narrow_clip)

    @model_validator(mode="after")
    def _shape_fits(self) -> GRFT:
        if self.shape == "chain" and self.score != "critic" and self.critic.type != "monte_carlo":
            raise ValueError(
                f'score = "{self.score}" needs leaves under every candidate, which shape = "chain" does not have; use '
                'shape = "tree", or critic.type = "monte_carlo", which draws continuations of each'
            )
        if self.kl.place == "reward":
            raise ValueError('kl.place = "reward": candidates are compared by scores alone; use "loss"')
        if getattr(self.critic, "form", None) == "earliest_error":
            raise ValueError(
                'critic.form = "earliest_error" scores a thought by its share of the whole chain, so that of two equal '
                'candidates the one that was gone on with has less; use form = "scores"'
            )
        if self.shape == "chain" and self.survivor != "sample" and self.critic.type == "monte_carlo":
            raise ValueError(
                'survivor = "sample" is needed with critic.type = "monte_carlo", which cannot draw while trees grow'
            )
        for name, need in self.without_meaning(dict(self)).items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: means nothing without {need}; take it out, or set that")
        if self.max_draws > 1 and (self.score != "critic" or self.critic.type == "monte_carlo"):
            raise ValueError(
                f"max_draws = {self.max_draws}: whether a group is drawn anew is decided while its tree grows, by a "
                'critic\'s scores; use score = "critic" with another critic than "monte_carlo", or max_draws = 1'
            )
        return self

    @classmethod
    def without_meaning(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Settings to which the others leave no meaning -> what would give them one.

        Args:
            given: settings as they are or will be; what is not given has its default.
        """
        shape, survivor, score = (
            given.get(name, cls.model_fields[name].default) for name in ("shape", "survivor", "score")
        )
        critics = 'score = "critic" or "mixed"'
        by_leaves = score == "outcome" and shape == "tree"
        meanings = {
            "group_size": ('shape = "chain"', shape == "chain"),
            "max_depth": ('shape = "chain"', shape == "chain"),
            "survivor": ('shape = "chain"', shape == "chain"),
            "survivor_temperature": (
                'shape = "chain", survivor = "softmax"',
                shape == "chain" and survivor == "softmax",
            ),
            "branching": ('shape = "tree"', shape == "tree"),
            "outcome_weight": ('score = "mixed"', score == "mixed"),
            "compare": (critics, score != "outcome"),
            "critic": (critics, not by_leaves),
            "rewards": (critics, score != "outcome"),
        }
        return {name: need for name, (need, met) in meanings.items() if not met}

    @property
    def asks_critic(self) -> bool:
        """Whether scores depend on a critic: all but those of a tree's leaves alone."""
        return "critic" not in self.without_meaning(dict(self))

    @property
    def levels(self) -> tuple[int, ...]:
        """Candidates at each depth."""
        return self.branching if self.shape == "tree" else (self.group_size,) * self.max_depth

    @property
    def open_paths(self) -> int:
        """Paths of one prompt that may grow or wait at the same time, each in a slot of the engine."""
        return math.prod(self.branching) if self.shape == "tree" else self.group_size


class SFT(Section):
    """Supervised fine-tuning: cross-entropy on worked completions, the prompt not trained."""

    name: Literal["sft"] = "sft"

    worked: str
    """Where the worked completion comes from: `key:NAME` of the row, or `file.py:function` called with the item."""

    reduction: Literal["token_mean", "sample_mean"] = "token_mean"
    """Mean over all completion tokens of the step, or over tokens in a sample and then over samples."""

    early_stopping: EarlyStopping | None = None
    """Ends training when the loss on held-out rows, measured every `evaluation.every` steps, falls no longer. Without
    the section training goes on to its last step."""


AlgorithmSettings = Annotated[
    GRPO
    | DrGRPO
    | DAPO
    | GSPO
    | CISPO
    | RLOO
    | Reinforce
    | PPO
    | ProcessGRPO
    | RFT
    | GRFT
    | VinePPO
    | SPOChain
    | SPOTree
    | SFT,
    Field(discriminator="name"),
]

ALGORITHM_NAMES: tuple[str, ...] = tuple(
    section.model_fields["name"].default for section in get_args(get_args(AlgorithmSettings)[0])
)

OfThoughts = ProcessGRPO | RFT | GRFT | VinePPO | SPOChain | SPOTree
"""Algorithms that cut completions into thoughts."""

OnTrees = GRFT | SPOTree
"""Algorithms that grow trees with a group at every prefix."""
