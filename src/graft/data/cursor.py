"""Which rows come next: epochs of shuffled positions that resume exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graft.errors import CheckpointError, ConfigError


class PromptCursor:
    """Deals out row positions, epoch after epoch.

    The order of an epoch depends on seed and epoch number alone, never on what was taken before. A batch may
    straddle two epochs, and can then hold the same row twice.

    Args:
        count: number of rows.
        seed: of the shuffling, 0 or more.
        shuffle: a new random order each epoch; False: the rows' own order.
        epochs: passes over the rows; None: no end.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, count: int, *, seed: int, shuffle: bool, epochs: int | None) -> None:
        if count < 1 or seed < 0 or (epochs is not None and epochs < 1):
            raise ConfigError(
                f"a prompt cursor wants count >= 1, seed >= 0 and epochs >= 1 or none; got count = {count}, "
                f"seed = {seed}, epochs = {epochs}."
            )
        self._count = count
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = epochs
        self._taken = 0
        self._returned: list[int] = []
        self._order_epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def taken(self) -> int:
        """Positions dealt out so far, over all epochs, those put back not counted."""
        return self._taken - len(self._returned)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next position belongs to, from 0; the number of epochs at the end."""
        return self._taken // self._count

    @property
    def remaining(self) -> int | None:
        """Positions left before exhaustion; None: no end."""
        return None if self._epochs is None else max(0, self._epochs * self._count - self.taken)

    def take(self, n: int) -> list[int]:
        """The next n positions in 0..count-1; fewer when the epochs run out, and none after that."""
        if n < 0:
            raise ConfigError(f"cannot take {n} rows; wants 0 or more.")
        left = self.remaining
        wanted = n if left is None else min(n, left)
        positions, self._returned = self._returned[:wanted], self._returned[wanted:]
        while len(positions) < wanted:
            start = self._taken % self._count
            part = self._epoch_order(self.epoch)[start : start + wanted - len(positions)]
            positions += part.tolist()
            self._taken += len(part)
        return positions

    def put_back(self, positions: Sequence[int]) -> None:
        """Positions that were taken and not used: they come next, in this order."""
        self._returned = [*positions, *self._returned]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {
            "taken": self._taken,
            "returned": list(self._returned),
            "count": self._count,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where another cursor over the same rows stood. The number of epochs may have changed since.

        Raises:
            CheckpointError: the state is of other rows, another seed or another order.
        """
        mine = self.state()
        different = [
            f"{key}: {state.get(key)} in the checkpoint, {mine[key]} here"
            for key in ("count", "seed", "shuffle")
            if state.get(key) != mine[key]
        ]
        taken = state.get("taken")
        if different or not isinstance(taken, int) or taken < 0:
            raise CheckpointError(
                "the checkpoint's place in the data does not fit: "
                f"{'; '.join(different) or f'taken = {taken!r}'}. Resume with the rows and settings that the "
                "run began with."
            )
        self._taken = taken
        self._returned = list(state.get("returned", ()))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._order_epoch:
            self._order_epoch = epoch
            positions = np.arange(self._count)
            self._order = (
                np.random.default_rng((self._seed, epoch)).permutation(positions)
                if self._shuffle
                else positions
            )
        return self._order
