"""Spans of a token tree with equal beginnings merged: siblings that start with the same tokens share them.

A trained policy is sure of most tokens, so the completions of a group are alike for long stretches. The same tokens
behind the same tokens have the same hidden states, so the network needs them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from graft.tree import ROOT, Tree

BEFORE = 0
"""The place before the prompt, which holds no token."""


class Row(NamedTuple):
    """The merged tokens in depth-first order, each one that something follows."""

    places: list[int]
    spans: list[tuple[int, int, int]]
    """Start, end, and end of all that follows, as indices into `places`; a span goes from branch to branch."""


class MergedPrefixes:
    """A place for every different beginning of a tree's paths."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.tokens: list[int] = [-1]
        self.parents: list[int] = [-1]
        self.positions: list[int] = [-1]
        self._next: list[dict[int, int]] = [{}]
        self.nodes: dict[int, list[int]] = {}
        """Node -> the places of its tokens."""
        self.length = 0
        """Tokens that the network must read: those that another one follows."""

    def add(self, path: Iterable[int]) -> None:
        """Add the nodes of a path from the root; those that are there stay."""
        for node in path:
            if node not in self.nodes:
                self.nodes[node] = self._enter(self._end_before(node), self.tree.nodes[node].tokens.tolist())

    def growth(self, path: Iterable[int]) -> int:
        """How much longer `length` would be with this path."""
        place, new, follows = BEFORE, 0, False
        for node in path:
            for token in self.tree.nodes[node].tokens.tolist():
                known = self._next[place].get(token) if not new else None
                if known is None:
                    follows = follows or (not new and place != BEFORE and not self._next[place])
                    new += 1
                else:
                    place = known
        return max(new - 1, 0) + follows

    def row(self) -> Row:
        """Depth-first order, children in the order in which they came."""
        places: list[int] = []
        spans: list[list[int]] = []
        above: list[int] = []
        waiting = [(place, -1) for place in reversed(self._read_after(BEFORE))]
        while waiting:
            place, parent = waiting.pop()
            start = len(places)
            while True:
                places.append(place)
                after = self._read_after(place)
                if len(after) != 1:
                    break
                [place] = after
            waiting += [(child, len(spans)) for child in reversed(after)]
            spans.append([start, len(places), len(places)])
            above.append(parent)
        for span, parent in zip(reversed(spans), reversed(above), strict=True):
            if parent >= 0:
                spans[parent][2] = max(spans[parent][2], span[2])
        return Row(places, [(start, end, subtree_end) for start, end, subtree_end in spans])

    def _end_before(self, node: int) -> int:
        if node == ROOT:
            return BEFORE
        parent = self.tree.nodes[node].parent
        return self.nodes[parent][-1] if self.nodes[parent] else self._end_before(parent)

    def _enter(self, place: int, tokens: Sequence[int]) -> list[int]:
        places = []
        for token in tokens:
            known = self._next[place].get(token)
            if known is None:
                self.length += place != BEFORE and not self._next[place]
                known = self._next[place][token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(place)
                self.positions.append(self.positions[place] + 1)
                self._next.append({})
            place = known
            places.append(place)
        return places

    def _read_after(self, place: int) -> list[int]:
        return [child for child in self._next[place].values() if self._next[child]]
