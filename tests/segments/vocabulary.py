"""A vocabulary of byte strings, as nasty as byte-level tokenizers get, and completions written in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.kept import KeptTokens
from graft.tree import ROOT, Kind, Tree
from graft.types import Prompt, StopReason, Tokens

EOS = 0
PIECES: tuple[bytes, ...] = (
    b"",  # EOS: special tokens are not printed
    *(bytes([byte]) for byte in range(256)),
    *(b"\n\n", b".\n\n", b"\n3", b"\r\n", b"\r\n\r\n", b" \n", b". ", b" So", b" the", b"12", b" + ", b" = "),
    *(b"<think>", b"</think>", b"<th", b"ink>", b"</", b"think", b">\n\n", b"Answer", b"Answer:", b": "),
    *(
        "é".encode()[:1],
        "é".encode()[1:],
        "数".encode()[:2],
        "数".encode()[2:],
        "🙂".encode()[:3],
        "🙂é".encode()[3:],
    ),
)
LARGER = tuple(range(257, len(PIECES)))
"""Ids of the tokens that are no single byte."""


def decode(tokens: Tokens | Sequence[int]) -> str:
    return b"".join(PIECES[int(token)] for token in tokens).decode("utf-8", errors="replace")


def ids(*pieces: str | bytes | int) -> list[int]:
    """Each piece as one token if the vocabulary has it, else byte by byte; a number is a token itself."""
    found: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            found.append(piece)
            continue
        raw = piece.encode() if isinstance(piece, str) else piece
        found += [PIECES.index(raw)] if raw in PIECES else [byte + 1 for byte in raw]
    return found


def make_prompt(text: str = "Q?", *, row: int = 0, **item: object) -> Prompt:
    messages = ({"role": "user", "content": text},)
    return Prompt(row, messages, item, np.array(ids(text), np.int32), text)


def make_tree(
    *completions: Sequence[int],
    prompt: Prompt | None = None,
    stop: StopReason | None = StopReason.EOS,
    sampled: bool = True,
    kept: bool = False,
) -> Tree:
    """Whole completions of one group; the log-probability of token i is -(i + 1)."""
    tree = Tree(prompt or make_prompt())
    group = tree.new_group()
    for tokens in completions:
        logprobs = [-float(i + 1) for i in range(len(tokens))] if sampled else None
        sets = [np.array([token], np.int32) for token in tokens]
        tree.add(
            ROOT,
            tokens,
            logprobs,
            group=group,
            kind=Kind.COMPLETION,
            stop=stop,
            kept=KeptTokens.of(sets, 1000) if kept else None,
        )
    return tree
