"""Bringing numbers to unit spread over a whole rollout batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

NO_SPREAD = 1e-6
"""A standard deviation below this share of the largest absolute value is rounding, not spread."""


def whiten(
    values: Float[Tensor, " values"], *, how: str, counts: Int[Tensor, " values"] | None = None
) -> Float[Tensor, " values"]:
    """Divide by the standard deviation, with or without subtracting the mean first.

    Args:
        values: all of the batch: over micro-batches, or ranks, the result would depend on the cutting.
        how: `none` changes nothing; `scale` divides by the standard deviation and so keeps every sign and the ratios
            between values; `full` also subtracts the mean first. On rewards of segments `full` pays or charges for
            each further segment.
        counts: how often each value counts in mean and deviation, at least 1 each, such as the tokens of a
            segment that share its advantage; None counts each once.

    The variance has N - 1. Values without spread have no unit to be brought to: `scale` leaves them as they are,
    `full` gives 0.

    Sources: the deck, "Reward Processing" ("optionally whiten"); for advantages, the PPO of
    lm-human-preference-details. TRL's `shift_mean=False` is another operation than `scale`: it adds the unscaled
    mean back. TRL's PPO whitens each rank by itself, and a single value there is a division by 0.
    """
    if how == "none" or values.numel() == 0:
        return values
    if how not in ("scale", "full"):
        raise ValueError(f"how = {how!r}: want 'none', 'scale' or 'full'")
    largest = values.abs().max()
    relative = values / largest.where(largest > 0, 1.0)  # within [-1, 1]: no square of it overflows
    times = torch.ones_like(values) if counts is None else counts.to(values.dtype)
    centred = relative - (times * relative).sum() / times.sum()
    deviation = ((times * centred**2).sum() / (times.sum() - 1).clamp(min=1)).sqrt()
    if deviation < NO_SPREAD:
        return values if how == "scale" else torch.zeros_like(values)
    return (relative if how == "scale" else centred) / deviation
