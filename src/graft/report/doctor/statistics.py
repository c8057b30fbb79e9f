"""The few statistics that the checks need. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

SURE = 2.0
"""Standard errors that a difference must exceed before it counts: about 95 %."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through values at rising places."""

    first: float
    """The line at the first place."""

    last: float

    error: float
    """Standard error of `last - first`; infinite where two points leave nothing to tell it from."""

    @property
    def sure_rise(self) -> float:
        """The rise that is left when the noise is taken off, and 0 where that is all of it."""
        return max(0.0, self.last - self.first - SURE * self.error)


def trend(places: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares: y = a + b x; var b = Σ residual² / (n - 2) / Σ (x - x̄)².

    Args:
        places: at least two different ones.
        values: one for each.
    """
    middle, mean = fmean(places), fmean(values)
    spread = sum((x - middle) ** 2 for x in places)
    slope = sum((x - middle) * (y - mean) for x, y in zip(places, values, strict=True)) / spread
    residual = sum((y - mean - slope * (x - middle)) ** 2 for x, y in zip(places, values, strict=True))
    error = math.sqrt(residual / (len(places) - 2) / spread) if len(places) > 2 else math.inf
    first, last = min(places), max(places)
    return Trend(mean + slope * (first - middle), mean + slope * (last - middle), error * (last - first))


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` samples; half a sample is added on both sides so that 0 and 1 have one."""
    smoothed = (share * count + 0.5) / (count + 1)
    return math.sqrt(smoothed * (1 - smoothed) / count)


def chance_of_order(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Chance that a random one of `higher` is above a random one of `lower`, ties counting half: the area under the
    ROC curve. 0.5 is chance."""
    ranked = sorted([(value, 0) for value in lower] + [(value, 1) for value in higher])
    wins, below, place = 0.0, 0, 0
    while place < len(ranked):
        end = place
        while end < len(ranked) and ranked[end][0] == ranked[place][0]:
            end += 1
        ties = [kind for _, kind in ranked[place:end]]
        wins += sum(ties) * (below + 0.5 * (len(ties) - sum(ties)))
        below += len(ties) - sum(ties)
        place = end
    return wins / (len(higher) * len(lower))
