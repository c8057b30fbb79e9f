"""Shares of variance, by hand."""

from __future__ import annotations

from benchmarks.advantages import variance_shares


def record(row: int, *paths: tuple[list[int], float | list[float]], stage: str = "train") -> dict:
    nodes = [{"parent": -1, "tokens": [9]}, *({"parent": 0, "tokens": tokens} for tokens, _ in paths)]
    advantages = {str(number): own for number, (_, own) in enumerate(paths, start=1)}
    return {"stage": stage, "step": 1, "row": row, "nodes": nodes, "advantages": advantages}


def test_shares_by_hand():
    """Row 0: the same segment with 1 and 3, another with 4 and 4; row 1: alone with -12. The mean is 0.

    In all 1 + 9 + 16 + 16 + 144 = 186; about row 0's mean of 3: 4 + 0 + 1 + 1 = 6, of which the same segment's own 2.
    """
    first = record(0, ([1], 1.0), ([1], 3.0), ([2], 4.0), ([2], [3.0, 5.0]))
    found = variance_shares([first, record(1, ([1], -12.0)), record(2, ([1], 50.0), stage="evaluation")])
    assert found == {"segments": 5, "with_siblings": 0.8, "within": 0.032, "between_actions": 0.022}


def test_longer_beginnings_are_told_apart():
    """Two segments with the same tokens behind different beginnings are no siblings."""
    tree = record(0, ([1], 0.0), ([2], 2.0))
    tree["nodes"] += [{"parent": 1, "tokens": [7]}, {"parent": 2, "tokens": [7]}]
    tree["advantages"] |= {"3": 5.0, "4": 5.0}
    found = variance_shares([tree])
    assert (found["segments"], found["with_siblings"]) == (4, 0.5)
    assert found["within"] == found["between_actions"] == round(2 / 18, 3)
