"""The parts of a run that optimise: a warm start, if there is one, then the algorithm."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graft.algorithm_parts import EarlyStopping
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
    steps: int | None
    """None where `generated_tokens` says how long it is."""

    after: Moment
    """The measurement that follows it."""

    generated_tokens: int | None = None
    """Tokens drawn for training since the run began at which the phase ends."""

    validate_every: int | None = None
    """Steps of a warm start between measurements of the loss on held-out rows."""

    early_stopping: EarlyStopping | None = None

    @property
    def validates(self) -> bool:
        """Whether the loss on the worked completions of held-out rows is measured."""
        return isinstance(self.settings, SFT) and (
            self.stage is Stage.TRAIN or self.validate_every is not None
        )

    def ended(self, *, steps: int, generated_tokens: int) -> bool:
        """Whether nothing is left to do.

        Args:
            steps: of this phase that were made.
            generated_tokens: drawn for training since the run began.
        """
        if self.generated_tokens is not None:
            return generated_tokens >= self.generated_tokens
        assert self.steps is not None
        return steps >= self.steps


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
                validate_every=warm.validate_every,
                early_stopping=warm.early_stopping,
            )
        )
    training = config.training
    steps = training.steps
    if training.epochs is not None:
        steps = math.ceil(training.epochs * training_rows / training.prompts_per_step)
    phases.append(
        Phase(
            stage=Stage.TRAIN,
            settings=config.algorithm,
            optimizer=config.optimizer,
            rows_per_step=training.prompts_per_step,
            steps=steps,
            after=Moment.AFTER,
            generated_tokens=training.generated_tokens,
            early_stopping=getattr(config.algorithm, "early_stopping", None),
        )
    )
    return phases
