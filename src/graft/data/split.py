"""Train and held-out rows, told apart by their questions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from graft.data.rows import Row
from graft.errors import DataError

SHARED_SHOWN = 3


def split_rows(rows: Sequence[Row], held_out: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Set rows aside for evaluation; no question is on both sides.

    Each question is hashed with the seed, and those with the lowest hashes are held out. A row's side thus
    depends on its own question and the threshold alone, not on order or position: of rows added later, those
    with hashes below the threshold become held out, each moving one other question to training; nothing else
    changes sides.

    Args:
        rows: to be split; both results keep their order.
        held_out: how many distinct questions to set aside. Of rows that share such a question the first is
            evaluated and the others are left out altogether: on the training side they would give it away.
        seed: another seed, another choice.

    Raises:
        DataError: fewer distinct questions than held_out + 1, so that nothing would be left to train on.
    """
    if held_out < 0:
        raise DataError(f"held_out = {held_out}: wants 0 or more rows.")
    first_with: dict[str, Row] = {}
    for row in rows:
        first_with.setdefault(row.key, row)
    if len(first_with) <= held_out:
        raise DataError(
            f"cannot hold out {held_out} of {len(rows)} rows: they have {len(first_with)} distinct "
            "questions, and at least one must be left for training. Lower data.held_out or give more rows."
        )
    chosen = set(sorted(first_with, key=lambda question: _hash(question, seed))[:held_out])
    train = [row for row in rows if row.key not in chosen]
    return train, [row for question, row in first_with.items() if question in chosen]


def refuse_overlap(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    """Check that separately given sets share no question.

    Raises:
        DataError: how many questions they share, and where the first of them are.
    """
    places = {row.key: row.where for row in train}
    shared = {row.key: row.where for row in held_out if row.key in places}
    if shared:
        listed = "\n".join(
            f"  {question[:80]!r} ({places[question]} and {where})"
            for question, where in list(shared.items())[:SHARED_SHOWN]
        )
        raise DataError(
            f"{len(shared)} questions are in both the training and the held-out rows, so the evaluation "
            f"would measure memory:\n{listed}\nRemove them from one side, or let data.held_out split one "
            "source."
        )


def _hash(question: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{question}".encode()).digest()
