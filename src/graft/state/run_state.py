"""Where a run stands, between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.errors import CheckpointError


@dataclass(slots=True)
class RunState:
    """Counts and places; everything of a run that is not a tensor."""

    steps: dict[str, int] = field(default_factory=dict)
    """Stage -> optimiser steps done."""

    cursors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> the place in its rows."""

    measured: list[str] = field(default_factory=list)
    """Moments at which held-out rows were measured in full."""

    carried: dict[str, float] = field(default_factory=dict)
    """What the algorithm's credit carries from one training step to the next, e.g. a running mean."""

    measuring_due: bool = False
    """Whether held-out rows are to be measured before the next step."""

    validation: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage -> the best validation loss so far, and the measurements in a row that were no better."""

    stopped_early: dict[str, str] = field(default_factory=dict)
    """Stage that ended before its last step -> why, for people."""

    generated_tokens: int = 0
    """Tokens drawn for training so far."""

    train_seconds: float = 0.0
    """Wall-clock time spent in warm-start and training steps."""

    score: float | None = None
    """Latest held-out accuracy; where none is measured, minus the latest validation loss."""

    @property
    def number(self) -> int:
        """Optimiser steps of all stages: numbers the checkpoints and the engine's weights."""
        return sum(self.steps.values())

    def to_json(self) -> dict[str, Any]:
        """For `state.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> RunState:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: a field is missing.
        """
        try:
            return cls(**{name: record[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise CheckpointError(f"the checkpoint's state lacks {error}") from None
