"""Chains for the tests of critics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from graft.types import Chain, Grade, Prompt

SARAH = (
    "Sarah had $50. She bought a book for $15 and then a toy for $10. After that, she earned $25 from a part-time job. "
    "How much money does Sarah have now?"
)
"""The question of the deck."""


def make_chain(
    *thoughts: str,
    question: str = SARAH,
    answer: str | None = "Answer: 50",
    score: float | None = 1.0,
    row: int = 0,
    **item: Any,
) -> Chain:
    """A chain whose token ids are its characters' code points."""
    prompt = Prompt(row, ({"role": "user", "content": question},), item, np.array([1, 2], np.int32), question)
    texts = [*thoughts, *([] if answer is None else [answer])]
    spans = tuple(np.array([ord(letter) for letter in text], np.int32) for text in texts)
    return Chain(prompt, thoughts, answer, spans, None if score is None else Grade(score))


def behind(chain: Chain, *earlier: tuple[str, str]) -> Chain:
    """The same chain with messages, of role and text, before its question."""
    messages = [*({"role": role, "content": text} for role, text in earlier), *chain.prompt.messages]
    return replace(chain, prompt=replace(chain.prompt, messages=tuple(messages)))
