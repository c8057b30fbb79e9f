"""The kept sets of a micro-batch's trained tokens, as the LM head needs them: a mask for a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graft.kept import KeptTokens, bitmap_words

NEVER = -1e9
"""Logit of a token that could not be drawn. Its probability is exactly 0, and 0 times its logarithm is 0, which
with minus infinity would not be a number."""


@dataclass(frozen=True, slots=True)
class KeptRows:
    """`KeptTokens` as tensors: N places, entries as described in `kept.py`."""

    words: Tensor  # int32 [M]
    ends: Tensor  # int64 [N]
    vocabulary: int

    @classmethod
    def of(cls, kept: KeptTokens) -> KeptRows:
        """The same sets as tensors."""
        return cls(torch.tensor(kept.words), torch.tensor(kept.ends), kept.vocabulary)

    def to(self, device: torch.device) -> KeptRows:
        """The same sets on `device`."""
        return KeptRows(self.words.to(device), self.ends.to(device), self.vocabulary)

    def bitmaps(self) -> Tensor:
        """Which tokens could be drawn at each place.

        Returns:
            int32 `[N, words]`; bit b of word w stands for token 32 w + b.
        """
        device, longest = self.words.device, bitmap_words(self.vocabulary)
        sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        is_bitmap = sizes == longest
        in_bitmap = is_bitmap.repeat_interleave(sizes)
        place = torch.arange(len(sizes), device=device).repeat_interleave(sizes)[~in_bitmap]
        tokens = self.words[~in_bitmap].long()
        maps = torch.zeros(len(sizes), longest, dtype=torch.int32, device=device)
        bits = (torch.ones_like(tokens) << tokens % 32).to(torch.int32)
        maps.view(-1).index_add_(0, place * longest + tokens // 32, bits)  # each bit once: a sum is a union
        maps[is_bitmap] = self.words[in_bitmap].view(-1, longest)
        maps[sizes == 0] = -1
        return maps


def forbid_(logits: Tensor, bitmaps: Tensor, first: int) -> Tensor:
    """Set the logits of tokens that could not be drawn to `NEVER`, in place.

    Args:
        logits: `[N, n]`, of vocabulary entries `first` to `first + n`.
        bitmaps: of `KeptRows.bitmaps`.
        first: a multiple of 32.
    """
    count = logits.shape[1]
    words = bitmaps[:, first // 32 : -(-(first + count) // 32), None]
    bits = (words >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return logits.masked_fill_(bits.flatten(1)[:, :count] == 0, NEVER)
