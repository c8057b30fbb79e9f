"""The parts of a run that optimise: a warm start, if there is one, then the algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graft.algorithm_settings import SFT, AlgorithmSettings
from graft.config import Optimizer, RunConfig
from graft.report.metrics import Moment, Stage


@dataclass(frozen=True, slots=True)
class Phase:
    """One of them, as plain values."""

    stage: Stage
    settings: AlgorithmSettings
    optimizer: Optimizer
    rows_per_step: int
    steps: int
    after: Moment
    """The measurement that follows it."""


def phases_of(config: RunConfig, *, training_rows: int) -> list[Phase]:
    """What the settings ask for; epochs are turned into steps (the last may be short of rows)."""
    phases = []
    if config.warm_start is not None:
        warm = config.warm_start
        phases.append(
            Phase(
                stage=Stage.WARM_START,
                settings=SFT(worked=warm.worked),
                optimizer=warm.optimizer,
                rows_per_step=warm.rows_per_step,
                steps=warm.steps,
                after=Moment.AFTER_WARM_START,
            )
        )
    training = config.training
    steps = training.steps or math.ceil((training.epochs or 1) * training_rows / training.prompts_per_step)
    phases.append(
        Phase(
            stage=Stage.TRAIN,
            settings=config.algorithm,
            optimizer=config.optimizer,
            rows_per_step=training.prompts_per_step,
            steps=steps,
            after=Moment.AFTER,
        )
    )
    return phases
