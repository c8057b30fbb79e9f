"""Trees and their credit -> flat rows in which every span stands once.

A micro-batch is one row of tokens `[T]` without padding. Each tree lies in depth-first order, so the
descendants of a span follow it directly: `Span(start, end, subtree_end)` is all that attention needs to know.
The last token of a leaf predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graft.kept import KeptTokens
from graft.tree import ROOT, Node, Tree
from graft.types import Credit
from graft.update.kept_rows import KeptRows


@dataclass(frozen=True, slots=True)
class Span:
    """Place of one node's tokens in the flat row: its own are start..end, its descendants' end..subtree_end."""

    start: int
    end: int
    subtree_end: int


@dataclass(frozen=True, slots=True)
class TokenSlice:
    """Where the trained tokens of one node stand in a micro-batch's token arrays."""

    tree: int
    node: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What goes through the network at once. T tokens in the row, N of them predicted and trained."""

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]: position in the path, the prompt starts at 0
    spans: tuple[Span, ...]  # in row order, empty ones left out
    predictors: Tensor  # int64 [N]: row index of the hidden state that predicts each trained token
    targets: Tensor  # int64 [N]: the trained tokens' ids
    engine_logprobs: Tensor  # fp32 [N], nats; 0 where nothing was sampled
    advantages: Tensor  # fp32 [N]
    weights: Tensor  # fp64 [N]: share of each token in the step's loss
    slices: tuple[TokenSlice, ...]
    kept: KeptRows | None = None  # what could have been drawn at each trained token; None: everything

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device)
            for name in (
                "tokens",
                "positions",
                "predictors",
                "targets",
                "engine_logprobs",
                "advantages",
                "weights",
            )
        }
        kept = None if self.kept is None else self.kept.to(device)
        return MicroBatch(spans=self.spans, slices=self.slices, kept=kept, **moved)


def pack(trees: Sequence[Tree], credits: Sequence[Credit], *, token_budget: int) -> list[MicroBatch]:
    """Pack the trained nodes of all trees, each span once, into micro-batches of about `token_budget` tokens.

    Nodes without credit and without credited descendants are left out, so a group without signal costs
    nothing. A tree larger than the budget is cut between leaves; its shared spans are then computed again
    as context but trained once. Weights are shares of the whole step, so the cutting changes no result.

    Args:
        trees: what was sampled.
        credits: one for each tree.
        token_budget: tokens a micro-batch may hold; a single path longer than it is a micro-batch of its own.
    """
    batches: list[MicroBatch] = []
    builder = _Builder()
    for index, (tree, credit) in enumerate(zip(trees, credits, strict=True)):
        for piece in _pieces(tree, credit.weights, token_budget):
            if builder.length and builder.length + piece.length > token_budget:
                batches.append(builder.build())
                builder = _Builder()
            builder.add(index, tree, credit, piece)
    if builder.length:
        batches.append(builder.build())
    return batches


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tree that fits a micro-batch."""

    nodes: frozenset[int]  # closed under parents
    trained: frozenset[int]
    length: int


def _pieces(tree: Tree, trained: Mapping[int, np.ndarray], budget: int) -> Iterator[_Piece]:
    """Cut a tree between its trained tips so that each piece stays within the budget where it can."""
    remaining = set(trained)
    nodes: set[int] = set()
    training: set[int] = set()
    for tip in tree.depth_first():
        if tip not in trained or any(child in trained for child in _descendants(tree, tip)):
            continue
        path = tree.path(tip)
        longer = nodes | set(path)
        if nodes and _length(tree, longer) > budget:
            yield _Piece(frozenset(nodes), frozenset(training), _length(tree, nodes))
            nodes, training, longer = set(), set(), set(path)
        nodes = longer
        training |= remaining & set(path)
        remaining -= set(path)
    if training:
        yield _Piece(frozenset(nodes), frozenset(training), _length(tree, nodes))


def _descendants(tree: Tree, node: int) -> Iterator[int]:
    for child in tree.children(node):
        yield child
        yield from _descendants(tree, child)


def _length(tree: Tree, nodes: set[int]) -> int:
    return sum(len(_fed(tree, i, nodes)) for i in nodes)


def _fed(tree: Tree, node: int, nodes: set[int] | frozenset[int]) -> np.ndarray:
    """The tokens of a node that the network must read: all, but for a tip all except the last."""
    is_tip = node != ROOT and not any(child in nodes for child in tree.children(node))
    tokens = tree.nodes[node].tokens
    return tokens[:-1] if is_tip else tokens


class _Builder:
    """Collects pieces of trees into one micro-batch."""

    def __init__(self) -> None:
        self.length = 0
        self._tokens: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._spans: list[Span] = []
        self._trained: list[tuple[TokenSlice, np.ndarray, np.ndarray, Tree, Credit]] = []
        self._count = 0

    def add(self, index: int, tree: Tree, credit: Credit, piece: _Piece) -> None:
        ends: dict[int, int] = {}  # node -> row index of the hidden state that stands after its last token
        starts: dict[int, tuple[int, int]] = {}
        order = [node for node in tree.depth_first() if node in piece.nodes]
        for node in order:
            fed = _fed(tree, node, piece.nodes)
            position = tree.start(node)
            start, end = self.length, self.length + len(fed)
            self._tokens.append(fed)
            self._positions.append(np.arange(position, position + len(fed)))
            starts[node] = (start, end)
            ends[node] = end - 1
            if node in piece.trained:
                before = np.array([ends[tree.nodes[node].parent]])
                predictors = np.concatenate([before, np.arange(start, start + len(tree.nodes[node]) - 1)])
                where = TokenSlice(index, node, self._count, self._count + len(predictors))
                self._trained.append((where, predictors, tree.nodes[node].tokens, tree, credit))
                self._count = where.end
            self.length = end
        for place, node in enumerate(order):
            start, end = starts[node]
            if start < end:
                self._spans.append(Span(start, end, _subtree_end(tree, order, place, starts)))

    def build(self) -> MicroBatch:
        engine = [
            tree.nodes[where.node].engine_logprobs
            if tree.nodes[where.node].sampled
            else np.zeros(where.end - where.start, dtype=np.float32)
            for where, _, _, tree, _ in self._trained
        ]
        return MicroBatch(
            tokens=_tensor(self._tokens, torch.int64),
            positions=_tensor(self._positions, torch.int64),
            spans=tuple(self._spans),
            predictors=_tensor([predictors for _, predictors, _, _, _ in self._trained], torch.int64),
            targets=_tensor([targets for _, _, targets, _, _ in self._trained], torch.int64),
            engine_logprobs=_tensor(engine, torch.float32),
            advantages=_tensor(
                [credit.advantages[w.node] for w, _, _, _, credit in self._trained], torch.float32
            ),
            weights=_tensor([credit.weights[w.node] for w, _, _, _, credit in self._trained], torch.float64),
            slices=tuple(where for where, *_ in self._trained),
            kept=_kept_rows([tree.nodes[where.node] for where, _, _, tree, _ in self._trained]),
        )


def _subtree_end(tree: Tree, order: list[int], place: int, starts: Mapping[int, tuple[int, int]]) -> int:
    """Row index after the last descendant of `order[place]`: depth-first order keeps them together."""
    end = starts[order[place]][1]
    inside = {order[place]}
    for node in order[place + 1 :]:
        if tree.nodes[node].parent not in inside:
            break
        inside.add(node)
        end = starts[node][1]
    return end


def _kept_rows(nodes: Sequence[Node]) -> KeptRows | None:
    """What could have been drawn at each token of these nodes; None where it was everything throughout."""
    truncated = [node.kept for node in nodes if node.kept is not None]
    if not truncated:
        return None
    vocabulary = truncated[0].vocabulary
    parts = [
        KeptTokens.everything(len(node), vocabulary) if node.kept is None else node.kept for node in nodes
    ]
    return KeptRows.of(KeptTokens.join(parts))


def _tensor(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype)
