"""Scores that depend on a completion's length alone."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def overlong_penalty(
    lengths: Int[Tensor, " samples"], *, max_new_tokens: int, buffer: int
) -> Float[Tensor, " samples"]:
    """Added to the score: 0 up to `max_new_tokens - buffer` tokens, then falling linearly to -1 at the limit.

        penalty = clip((max_new_tokens - buffer - length) / buffer, -1, 0)

    Args:
        lengths: tokens of each completion, the end-of-sequence token counted.
        max_new_tokens: the limit, L_max in the paper.
        buffer: L_cache, tokens, at least 1: 4096 of 20480 in the paper.

    Source: DAPO, arXiv:2503.14476, eq. 13.
    """
    return ((max_new_tokens - buffer - lengths).double() / buffer).clamp(-1, 0)
