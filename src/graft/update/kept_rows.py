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

    def forbid_(self, logits: Tensor, first: int) -> Tensor:
        """Set the logits of tokens that could not be drawn to `NEVER`, in place.

        Args:
            logits: `[n, vocabulary]`, of the places from `first` on.
            first: place of the first row.
        """
        keep = self.masks(first, first + len(logits))
        return logits.masked_fill_(keep.logical_not_(), NEVER)

    def masks(self, first: int, last: int) -> Tensor:
        """Which tokens could be drawn at the places from `first` to `last`, the latter not included.

        Returns:
            bool `[last - first, vocabulary]`.
        """
        device, longest = self.words.device, bitmap_words(self.vocabulary)
        begin = int(self.ends[first - 1]) if first else 0
        ends = self.ends[first:last]
        words = self.words[begin : int(ends[-1])]
        sizes = ends.diff(prepend=ends.new_tensor([begin]))
        is_bitmap = sizes == longest
        in_bitmap = is_bitmap.repeat_interleave(sizes)
        place = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        keep = torch.zeros(len(sizes), self.vocabulary, dtype=torch.bool, device=device)
        keep[place[~in_bitmap], words[~in_bitmap].long()] = True
        octets = words[in_bitmap].view(torch.uint8).view(-1, 4 * longest, 1)
        bits = (octets >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
        keep[is_bitmap] = bits.view(-1, 32 * longest)[:, : self.vocabulary].bool()
        keep[sizes == 0] = True
        return keep
