"""Which tokens could have been drawn at each place of a span, where top-k, top-p or min-p cut some off.

A sampler that truncates renormalises over the tokens it kept, so a log-probability means something only together
with that set. Each place has an entry of 32-bit words:

    shorter than a bitmap    the kept ids, rising
    as long as a bitmap      a bit for each token of the vocabulary, the lowest first: ceil(vocabulary / 32) words
    empty                    every token: nothing was cut off here

An entry so costs 4 bytes a kept token and never more than vocabulary / 8 bytes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graft.errors import DataError
from graft.types import Tokens

Entry = npt.NDArray[np.int32]
"""The kept set of one place, as the module describes it."""


def bitmap_words(vocabulary: int) -> int:
    """32-bit words of a bitmap over the vocabulary."""
    return -(-vocabulary // 32)


def entry_of(mask: npt.NDArray[np.bool_]) -> Entry:
    """The entry of a kept set, given as one flag for each token of the vocabulary."""
    ids = np.flatnonzero(mask)
    words = bitmap_words(len(mask))
    if len(ids) == len(mask):
        return np.zeros(0, dtype=np.int32)
    if len(ids) < words:
        return ids.astype(np.int32)
    bits = np.zeros(4 * words, dtype=np.uint8)
    packed = np.packbits(mask, bitorder="little")
    bits[: len(packed)] = packed
    return bits.view("<i4").astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class KeptTokens:
    """The kept sets of consecutive places."""

    words: npt.NDArray[np.int32]
    """All entries, one after the other; read-only."""

    ends: npt.NDArray[np.int64]
    """Where the entry of each place ends in `words`, one for each place; read-only."""

    vocabulary: int
    """Number of tokens that an untruncated sampler could draw."""

    def __post_init__(self) -> None:
        for array in (self.words, self.ends):
            array.setflags(write=False)

    @classmethod
    def of(cls, entries: Sequence[Entry], vocabulary: int) -> KeptTokens:
        """The sets of several places, one entry each."""
        words = np.concatenate(entries).astype(np.int32, copy=False) if entries else np.zeros(0, np.int32)
        return cls(words, np.cumsum([len(entry) for entry in entries], dtype=np.int64), vocabulary)

    @classmethod
    def everything(cls, places: int, vocabulary: int) -> KeptTokens:
        """Places at which nothing was cut off."""
        return cls(np.zeros(0, np.int32), np.zeros(places, np.int64), vocabulary)

    @classmethod
    def join(cls, parts: Sequence[KeptTokens]) -> KeptTokens:
        """One after the other; at least one part, all over the same vocabulary."""
        before = np.cumsum([0, *(len(part.words) for part in parts[:-1])])
        ends = [part.ends + offset for part, offset in zip(parts, before, strict=True)]
        words = [part.words for part in parts]
        return cls(np.concatenate(words), np.concatenate(ends), parts[0].vocabulary)

    def __len__(self) -> int:
        return len(self.ends)

    def part(self, start: int, end: int) -> KeptTokens:
        """The places from `start` to `end`, the latter not included."""
        edges = np.concatenate([[0], self.ends])
        begin = edges[start]
        return KeptTokens(self.words[begin : edges[end]], self.ends[start:end] - begin, self.vocabulary)

    def contain(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """Whether each place kept the token that stands there: `[places]`, one token a place."""
        sizes = np.diff(self.ends, prepend=0)
        place = np.repeat(np.arange(len(self)), sizes)
        is_bitmap = sizes == bitmap_words(self.vocabulary)
        found = sizes == 0
        found[place[(self.words == tokens[place]) & ~is_bitmap[place]]] = True
        known = tokens < self.vocabulary
        in_bitmap = is_bitmap & known
        word = self.words[(self.ends - sizes + tokens // 32)[in_bitmap]]
        found[in_bitmap] = (word >> (tokens[in_bitmap] % 32)) & 1 == 1
        return found & known

    def to_json(self) -> dict[str, Any]:
        """Plain lists; `from_json` gives the same sets back."""
        return {
            "vocabulary": self.vocabulary,
            "ends": self.ends.tolist(),
            "words": self.words.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> KeptTokens:
        """Read what `to_json` wrote.

        Raises:
            DataError: the entries do not fit together, or name tokens that are not in the vocabulary.
            KeyError, TypeError, ValueError: a field is missing or of the wrong type.
        """
        vocabulary = int(record["vocabulary"])
        ends = np.array(record["ends"], dtype=np.int64)
        words = np.array(record["words"], dtype=np.int32)
        sizes = np.diff(ends, prepend=0)
        longest = bitmap_words(vocabulary)
        if (sizes < 0).any() or (sizes > longest).any() or (len(words) != (ends[-1] if len(ends) else 0)):
            raise DataError(
                f"kept tokens: the entries' ends must rise to the {len(words)} words that there are, by at most "
                f"{longest} each (vocabulary {vocabulary})"
            )
        ids = words[np.repeat(sizes < longest, sizes)]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise DataError(f"kept tokens: ids must be from 0 to {vocabulary - 1}")
        return cls(words, ends, vocabulary)
