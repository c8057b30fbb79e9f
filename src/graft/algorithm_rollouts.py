"""Sections of algorithms whose values are measured by rollouts: VinePPO, SPO-chain, SPO-tree. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from graft.algorithm_parts import Reused, Sampled, TokenClip
from graft.critics.settings import MonteCarlo
from graft.section import Section
from graft.segments.settings import Segments


class Masked(Section):
    """Algorithms that train unlikely tokens alone."""

    train_below: float = Field(default=0.9, gt=0, le=1)
    """Probability mask: tokens that were drawn with at least this probability have no part in loss and mean. 1: all
    train that were not certain."""


class OfRollouts(Sampled, Reused):
    """What they have in common."""

    whiten: bool = True
    """Bring the advantages of the batch's trained tokens to mean 0 and standard deviation 1."""

    clip: TokenClip = TokenClip()

    @model_validator(mode="after")
    def _kl_stands_in_the_loss(self) -> OfRollouts:
        if self.kl.place == "reward":
            raise ValueError('kl.place = "reward": values are shares of solved rollouts; use "loss"')
        return self


class StepsOfRollouts(OfRollouts):
    """Completions cut into steps, with rollouts from the end of each."""

    group_size: int = Field(default=8, ge=1)
    """Samples for each prompt."""

    critic: MonteCarlo = MonteCarlo(continuations=9)
    """What draws the rollouts."""


class VinePPO(StepsOfRollouts):
    """PPO whose values are shares of solved rollouts instead of a model's (arXiv:2410.01679)."""

    name: Literal["vineppo"] = "vineppo"

    segments: Segments = Segments()


class SPOChain(StepsOfRollouts, Masked):
    """Segment policy optimisation on chains: steps end at unlikely tokens, which alone train (arXiv:2505.23564)."""

    name: Literal["spo_chain"] = "spo_chain"

    segments: Segments = Segments(cutter="low_probability:0.9:5")


class SPOTree(OfRollouts, Masked):
    """Segment policy optimisation on trees: a node's value is the mean of its children's (arXiv:2505.23564)."""

    name: Literal["spo_tree"] = "spo_tree"

    branching: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(4, 4, 4), min_length=1)
    """Candidates at each depth. Those of the last are drawn to the end of the completion."""

    scale: Literal["none", "group_std"] = "none"
    """Leave V(s) - V(parent) as it is, or divide by the standard deviation of the siblings' values."""

    segments: Segments = Segments(cutter="tokens:30")

    group_size: int = Field(default=1, ge=1)
    """Always 1: `branching` says how many candidates follow each prefix."""

    @model_validator(mode="after")
    def _groups_are_those_of_branching(self) -> SPOTree:
        if self.group_size != type(self).model_fields["group_size"].default:
            raise ValueError(
                f"group_size = {self.group_size}: means nothing here, where branching says how many candidates follow "
                "each prefix; take it out"
            )
        return self

    @property
    def open_paths(self) -> int:
        """Paths of one prompt that may grow or wait at the same time, each in a slot of the engine."""
        return math.prod(self.branching)
