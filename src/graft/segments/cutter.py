"""Completions -> thoughts and an answer. One incremental interface, while growing and afterwards, with one result.

    cutting = cutter.begin(prompt.tokens)
    for token, logprob in ...:
        boundary = cutting.feed(token, logprob)     # does a boundary lie after this token?

Thoughts end with the closing tag. Without tags they end before the segment in which the answer marker is completed.
A boundary is known before the next token is drawn, which settles the rest:

- The answer is one segment, from the start of the segment in which the marker stands to the end. After a closing tag it
  begins with the next token; the tag belongs to the thought before it.
- Segments without a letter or digit (white space, rules, tags) get no boundary: they join the following segment. So a
  closing tag on a line of its own joins the answer, for the thought before it is over by then.
- A completion that ends by itself has an answer: its last segment, marker or not. One that was cut off has none: what
  it had begun of an answer is its last thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graft.segments.rules import Rule, SegmentSoFar
from graft.segments.text_stream import Decode, TextStream
from graft.tree import Kind
from graft.types import LogProbs, StopReason, Tokens

GENERATION_PROMPT = 64
"""Last tokens of the prompt among which an opening tag of the chat template is looked for."""


@dataclass(frozen=True, slots=True)
class Cutter:
    """How completions are cut."""

    rule: Rule
    decode: Decode
    think_open: str = "<think>"
    """Empty: no tags are looked for; the same for the others."""

    think_close: str = "</think>"
    answer_marker: str = "Answer:"

    def begin(self, prompt: Tokens) -> Cutting:
        """The start of a completion of a prompt. A template that ends with the opening tag has begun the thoughts."""
        ending = self.decode(prompt[-GENERATION_PROMPT:]).rstrip() if self.think_open else ""
        return Cutting(self, opened=bool(self.think_open) and ending.endswith(self.think_open))

    def cut(
        self, prompt: Tokens, tokens: Tokens, logprobs: LogProbs | None, stop: StopReason | None
    ) -> tuple[list[int], list[Kind]]:
        """A whole completion.

        Args:
            prompt: token ids that it continues.
            tokens: its ids.
            logprobs: one for each token, nats; None where nothing was sampled.
            stop: why it ended; None for a worked example.

        Returns:
            Where in `tokens` the second and every later piece starts, and the kind of each piece.
        """
        cutting = self.begin(prompt)
        after = [
            place
            for place, token in enumerate(tokens.tolist(), start=1)
            if cutting.feed(token, None if logprobs is None else float(logprobs[place - 1]))
        ]
        starts = [place for place in after if place < len(tokens)]
        last = Kind.THOUGHT if stop is StopReason.LENGTH else Kind.ANSWER
        return starts, [Kind.THOUGHT] * len(starts) + [last]


class Cutting:
    """One completion while it is cut."""

    def __init__(self, cutter: Cutter, *, opened: bool) -> None:
        self._cutter = cutter
        self._stream = TextStream(cutter.decode)
        self._before = ""  # end of the segments before, where a spelling may begin that ends in this one
        self._text = ""
        self._logprobs: list[float | None] = []
        self._tagged = opened
        self.answering = False
        """Whether the current segment is the answer: no boundary comes any more."""

    def feed(self, token: int, logprob: float | None) -> bool:
        """Take the next token; whether a boundary lies after it.

        Raises:
            DataError: the rule needs a log-probability and there is none.
        """
        if self.answering:
            return False
        cutter, fresh = self._cutter, len(self._text)
        self._text += self._stream.feed([token])
        self._logprobs.append(logprob)
        if self._completed(cutter.think_close, fresh):
            self.answering = True
            return self._ends_at(len(self._text))
        self._tagged |= self._completed(cutter.think_open, fresh)
        if not self._tagged and self._completed(cutter.answer_marker, fresh):
            self.answering = True
            return False
        end = cutter.rule(SegmentSoFar(self._text, fresh, len(self._logprobs), self._logprobs))
        return end is not None and self._ends_at(end)

    def fork(self) -> Cutting:
        """A second completion that goes on from here."""
        other = Cutting(self._cutter, opened=self._tagged)
        other._stream = self._stream.fork()
        other._before, other._text, other._logprobs = self._before, self._text, list(self._logprobs)
        other.answering = self.answering
        return other

    def _completed(self, spelling: str, fresh: int) -> bool:
        """Whether a spelling ends among the newest characters."""
        seen = self._before + self._text
        return bool(spelling) and spelling in seen[max(0, len(self._before) + fresh - len(spelling) + 1) :]

    def _ends_at(self, place: int) -> bool:
        """Begin the next segment, unless there is nothing yet before `place`."""
        if self._is_blank(self._text[:place]):
            return False
        longest = max(map(len, self._spellings()))
        self._before = (self._before + self._text)[-longest:]
        self._text, self._logprobs = "", []
        return True

    def _is_blank(self, text: str) -> bool:
        for tag in (self._cutter.think_open, self._cutter.think_close):
            text = text.replace(tag, "") if tag else text
        return not any(map(str.isalnum, text))

    def _spellings(self) -> Sequence[str]:
        return self._cutter.think_open, self._cutter.think_close, self._cutter.answer_marker
