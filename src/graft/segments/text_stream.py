"""Token ids -> text, piece by piece: each character is handed out once, with the token that completes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graft.types import Tokens

Decode = Callable[[Tokens], str]
"""Token ids -> text. Must not leave out the spellings that a cutter looks for, such as `<think>`."""

REPLACEMENT = "\ufffd"
"""What decoders print for bytes that are no character, or none yet."""

WINDOW = 24
"""Tokens that are decoded together at most, while nothing is held back."""

CONTEXT = 8
"""Tokens that stay in front of new ones: some decoders treat the first token of a text differently."""


class TextStream:
    """The text of one sequence of tokens. What looks like half a character is held back until it is whole."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0

    def feed(self, tokens: Sequence[int] | Tokens) -> str:
        """The characters that are complete now and were not before."""
        self._window.extend(int(token) for token in tokens)
        text = self._text(self._window)
        whole = text.rstrip(REPLACEMENT)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if len(self._window) > WINDOW and whole == text:
            self._shorten(text)
        return new

    def end(self) -> str:
        """What is still held back: bytes that are no character."""
        text = self._text(self._window)
        rest = text[self._given :]
        self._given = max(self._given, len(text))
        return rest

    def fork(self) -> TextStream:
        """A second stream that goes on from here."""
        other = TextStream(self._decode)
        other._window, other._given = list(self._window), self._given
        return other

    def _shorten(self, text: str) -> None:
        """Forget old tokens, unless the rest would then read differently: it begins inside a character."""
        tail = self._text(self._window[-CONTEXT:])
        if text.endswith(tail) and not tail.startswith(REPLACEMENT):
            self._window, self._given = self._window[-CONTEXT:], len(tail)

    def _text(self, window: Sequence[int]) -> str:
        return self._decode(np.array(window, dtype=np.int32))
