"""From logits to a token and its log-probability, one uniform number a token.

Every sample has a random stream of its own, keyed by what it is for (run seed, purpose, step, row, attempt,
place in the group). Position i of the stream is a hash of key and i, so batching, refilling and resuming change
no sample, and a re-draw (another attempt) differs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graft.kernels.library import load_kernels
from graft.types import Purpose

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The distribution that completions are drawn from, as plain values."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def truncated(self) -> bool:
        """Whether some tokens are never drawn, so that probabilities are renormalised over the kept ones.

        `top_p = 1` and `min_p = 0` keep every token and count as no truncation.
        """
        return self.top_k is not None or (self.top_p or 1) < 1 or (self.min_p or 0) > 0


def stream_key(seed: int, purpose: Purpose, step: int, row: int, attempt: int, *path: int) -> int:
    """64-bit key of one sample's random stream.

    Args:
        seed: of the run.
        purpose: training, evaluation or Monte Carlo.
        step: optimiser step (0 for an evaluation that shall always use the same numbers).
        row: index of the row in its data set.
        attempt: counts re-draws of the same group.
        path: place in the tree, e.g. the index in the group.
    """
    text = ":".join([str(seed), str(purpose), str(step), str(row), str(attempt), *map(str, path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (key, position): SplitMix64 (Steele et al. 2014), top 53 bits.

    Args:
        keys: uint64 `[rows]`, from `stream_key`.
        positions: integer `[rows]`, index of the token in its sample.

    Returns:
        float64 `[rows]`.
    """
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Drawn(NamedTuple):
    """One token for each row."""

    tokens: np.ndarray  # integer [rows]
    logprobs: np.ndarray  # fp32 [rows], nats, in the distribution drawn from
    kept: Tensor | None  # bool [rows, vocabulary] if that is truncated


def draw_rows(logits: Tensor, uniform: np.ndarray, settings: SamplingSettings) -> Drawn:
    """`draw` with numpy arrays at its ends; by the native sampler where it can, which does less work."""
    kernels = load_kernels() if logits.device.type == "cpu" and not settings.truncated else ""
    if not isinstance(kernels, str) and logits.dtype == torch.float32:
        return Drawn(*kernels.sample(logits.contiguous(), uniform, settings.temperature), None)
    tokens, logprobs, kept = draw(logits, torch.from_numpy(uniform), settings)
    return Drawn(tokens.cpu().numpy(), logprobs.cpu().numpy(), kept)


def keep_mask(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Which tokens may be drawn: bool, same shape as `logits` (already divided by the temperature).

    Filters apply one after the other, each to what the one before kept: top-k, then top-p (the smallest set
    with at least that much of the kept probability), then min-p. The most likely token always stays. Ties at
    the k-th place all stay.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        keep = logits >= logits.topk(settings.top_k, dim=-1).values[..., -1:]
    if (
        settings.top_p is not None and settings.top_p < 1
    ):  # 1 keeps all: a running sum would miss the last ones
        p = logits.masked_fill(~keep, -torch.inf).softmax(-1)
        ordered, index = p.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        keep &= torch.zeros_like(keep).scatter(-1, index, before < settings.top_p)
    if settings.min_p is not None:
        p = logits.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= p >= settings.min_p * p.max(-1, keepdim=True).values
    return keep


def draw(logits: Tensor, uniform: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token a row by inverting the cumulative distribution.

    token = the smallest i with Σ_{j<=i} softmax(z)_j > u, z = logits / temperature over the kept tokens.

    Args:
        logits: fp32 `[rows, vocabulary]`.
        uniform: fp64 `[rows]` in [0, 1).
        settings: temperature and truncation.

    Returns:
        Tokens int64 `[rows]`, log-probabilities fp32 `[rows]` in the distribution drawn from, and the kept
        mask `[rows, vocabulary]` if it is truncated.
    """
    z = logits.float() / settings.temperature
    keep = keep_mask(z, settings) if settings.truncated else None
    if keep is not None:
        z = z.masked_fill(~keep, -torch.inf)
    top = z.max(-1, keepdim=True).values
    weights = torch.exp(z - top)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform[:, None].to(cumulative.device) * total, right=True)[:, 0]
    # u just below 1 can land past the last kept token by rounding; step back to one that may be drawn
    token = torch.minimum(token, (weights > 0).int().cumsum(-1).argmax(-1))
    logprob = z.gather(1, token[:, None])[:, 0] - top[:, 0] - total[:, 0].log().float()
    return token, logprob, keep
