"""Where a thought ends: pure rules on the segment so far. `parse_rule` knows their names.

A rule is asked after each token, before the next one is drawn, and sees no further. It answers with the place in the
segment's text where the thought ends, or None. The boundary then lies after the token: characters of it that stand
behind that place stay with the thought that ends, for a token cannot be divided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graft.errors import DataError


@dataclass(frozen=True, slots=True)
class SegmentSoFar:
    """The segment that grows at the moment."""

    text: str
    fresh: int
    """Where in `text` the characters of the newest token begin."""

    tokens: int
    logprobs: Sequence[float | None]
    """One for each token, nats; None where nothing was sampled."""


Rule = Callable[[SegmentSoFar], int | None]

FORMS = "'line', 'paragraph', 'sentence', 'tokens:N', 'low_probability:P' or 'low_probability:P:N'"

_BLANK_LINE = re.compile(r"\n(?=([^\S\n]*\n))")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*]*(?=\s)")
_ENDS_NOW = re.compile(r"(?:[!?…]|(?<![\d.])\.)[\"'”’)\]*]*\Z")
_NO_SENTENCE = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|approx|No|e\.g|i\.e|etc|[A-Za-z])|^\s*\d+)\.$", re.IGNORECASE
)
"""Abbreviations, initials, and the number of a list's entry."""


def line(segment: SegmentSoFar) -> int | None:
    """A thought is a line."""
    end = segment.text.rfind("\n", segment.fresh)
    return end if end >= 0 else None


def paragraph(segment: SegmentSoFar) -> int | None:
    """A thought ends with a blank line."""
    ends = [found.start() for found in _BLANK_LINE.finditer(segment.text) if found.end(1) > segment.fresh]
    return ends[-1] if ends else None


def sentence(segment: SegmentSoFar) -> int | None:
    """A thought is a sentence, or a line.

    A full stop behind a digit may be a decimal point, so it counts only when white space follows: the boundary then
    lies after the token that brings it, often the first word of the next sentence.
    """
    text, fresh = segment.text, segment.fresh
    ends = [end for end in (line(segment),) if end is not None]
    ends += [
        found.end()
        for found in _SENTENCE_END.finditer(text)
        if found.end() >= fresh and not _NO_SENTENCE.search(text[: found.end()])
    ]
    if len(text) > fresh and _ENDS_NOW.search(text) and not _NO_SENTENCE.search(text):
        ends.append(len(text))
    return max(ends, default=None)


def tokens(count: int) -> Rule:
    """A thought is so many tokens long."""

    def rule(segment: SegmentSoFar) -> int | None:
        return len(segment.text) if segment.tokens >= count else None

    return rule


def low_probability(probability: float, count: int) -> Rule:
    """A thought ends after the `count`-th token that was less likely than `probability` when it was drawn.

    Source: SPO, arXiv:2505.23564, the partition by cutpoints. The paper: probability 0.9, several cutpoints a segment.
    """
    limit = math.log(probability)

    def rule(segment: SegmentSoFar) -> int | None:
        unlikely = 0
        for logprob in segment.logprobs:
            if logprob is None:
                raise DataError(
                    "cutter 'low_probability' needs the log-probability of every token, and these tokens were not "
                    "sampled. Use another cutter for worked completions."
                )
            unlikely += logprob < limit
        return len(segment.text) if unlikely >= count else None

    return rule


def parse_rule(name: str) -> Rule:
    """The rule that a setting names.

    Raises:
        ValueError: it names none; the message says what it wants.
    """
    kind, *arguments = name.split(":")
    plain = {"line": line, "paragraph": paragraph, "sentence": sentence}
    try:
        if kind in plain and not arguments:
            return plain[kind]
        if kind == "tokens" and len(arguments) == 1 and int(arguments[0]) >= 1:
            return tokens(int(arguments[0]))
        if kind == "low_probability" and len(arguments) in (1, 2):
            probability, count = float(arguments[0]), int(arguments[1]) if arguments[1:] else 1
            if 0 < probability <= 1 and count >= 1:
                return low_probability(probability, count)
    except ValueError:
        pass  # not a number: the message below says what is wanted
    raise ValueError(f"{name!r} names no cutter; want {FORMS}, with N from 1 and 0 < P <= 1")
