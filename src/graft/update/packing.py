"""Trees and their credit -> flat rows in which every beginning stands once.

A micro-batch is one row of tokens `[T]` without padding. Spans with equal beginnings are merged (`prefixes.py`). Each
tree lies in depth-first order, so what follows a span stands directly behind it: `Span(start, end, subtree_end)` is
all that attention needs to know. The last token of a leaf predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graft.kept import KeptTokens
from graft.tree import Node, Tree
from graft.types import Appraisal, Credit
from graft.update.kept_rows import KeptRows
from graft.update.prefixes import MergedPrefixes


@dataclass(frozen=True, slots=True)
class Span:
    """Place of neighbouring tokens in the flat row: they are start..end, all that follows them end..subtree_end."""

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
    """What goes through the network at once: T tokens in the row, U different predictions, N trained tokens.

    Trained tokens with equal beginnings share their prediction.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]: position in the path, the prompt starts at 0
    spans: tuple[Span, ...]  # in row order, empty ones left out
    predictors: Tensor  # int64 [U]: row index of the hidden state that predicts
    targets: Tensor  # int64 [U]: the token ids that are predicted
    predictions: Tensor  # int64 [N]: the prediction of each trained token
    nodes: Tensor  # int64 [N]: index in `slices` of each trained token's node
    engine_logprobs: Tensor  # fp32 [N], nats; 0 where nothing was sampled
    advantages: Tensor  # fp32 [N]
    weights: Tensor  # fp64 [N]: share of each token in the step's loss
    slices: tuple[TokenSlice, ...]
    kept: KeptRows | None = None  # what could have been drawn at each of the U predictions; None: everything
    old_logprobs: Tensor | None = None  # fp32 [N], nats; this and the next three as in `Appraisal`
    anchor_logprobs: Tensor | None = None  # fp32 [N], nats
    anchor_states: Tensor | None = None  # fp32 [U, width]
    old_values: Tensor | None = None  # fp32 [N]
    value_targets: Tensor | None = None  # fp32 [N]; this and the next as in `Credit`
    value_weights: Tensor | None = None  # fp64 [N]

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor | KeptRows):
                moved[name] = value.to(device)
        return MicroBatch(**moved)


def pack(
    trees: Sequence[Tree],
    credits: Sequence[Credit],
    *,
    token_budget: int,
    appraisals: Sequence[Appraisal] | None = None,
) -> list[MicroBatch]:
    """Pack the trained nodes of all trees, each beginning once, into micro-batches of about `token_budget` tokens.

    Nodes without credit and without credited descendants are left out, so a group without signal costs
    nothing. A tree larger than the budget is cut between leaves; its shared spans are then computed again
    as context but trained once. Weights are shares of the whole step, so neither merging nor cutting changes a result.

    Args:
        trees: what was sampled.
        credits: one for each tree.
        token_budget: tokens a micro-batch may hold; a single path longer than it is a micro-batch of its own.
        appraisals: one for each tree; what they hold, they hold for every trained node.
    """
    batches: list[MicroBatch] = []
    builder = _Builder()
    appraised = [Appraisal()] * len(trees) if appraisals is None else appraisals
    for index, (tree, credit, appraisal) in enumerate(zip(trees, credits, appraised, strict=True)):
        for piece in _pieces(tree, credit.weights, token_budget):
            if builder.length and builder.length + piece.prefixes.length > token_budget:
                batches.append(builder.build())
                builder = _Builder()
            builder.add(index, tree, credit, appraisal, piece)
    if builder.length:
        batches.append(builder.build())
    return batches


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tree that fits a micro-batch."""

    prefixes: MergedPrefixes
    trained: list[int]


def _pieces(tree: Tree, trained: Mapping[int, np.ndarray], budget: int) -> Iterator[_Piece]:
    """Cut a tree between its trained tips so that each piece stays within the budget where it can."""
    remaining = set(trained)
    piece = _Piece(MergedPrefixes(tree), [])
    for tip in tree.depth_first():
        if tip not in trained or any(child in trained for child in _descendants(tree, tip)):
            continue
        path = tree.path(tip)
        if piece.trained and piece.prefixes.length + piece.prefixes.growth(path) > budget:
            yield piece
            piece = _Piece(MergedPrefixes(tree), [])
        piece.prefixes.add(path)
        piece.trained.extend(node for node in path if node in remaining)
        remaining -= set(path)
    if piece.trained:
        yield piece


def _descendants(tree: Tree, node: int) -> Iterator[int]:
    for child in tree.children(node):
        yield child
        yield from _descendants(tree, child)


class _Builder:
    """Collects pieces of trees into one micro-batch."""

    def __init__(self) -> None:
        self.length = 0
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._spans: list[Span] = []
        self._predictors: list[int] = []
        self._targets: list[int] = []
        self._firsts: list[tuple[Node, int]] = []  # for each prediction, the first trained token that has it
        self._first_places: list[int] = []  # of that token among the trained ones
        self._predictions: list[int] = []
        self._trained: list[tuple[TokenSlice, Node, Credit, Appraisal]] = []

    def add(self, index: int, tree: Tree, credit: Credit, appraisal: Appraisal, piece: _Piece) -> None:
        prefixes = piece.prefixes
        places, spans = prefixes.row()
        row_of = {place: self.length + i for i, place in enumerate(places)}
        self._tokens += [prefixes.tokens[place] for place in places]
        self._positions += [prefixes.positions[place] for place in places]
        self._spans += [Span(*(self.length + bound for bound in span)) for span in spans]
        self.length += len(places)
        known: dict[int, int] = {}
        for node in piece.trained:
            start = len(self._predictions)
            for offset, place in enumerate(prefixes.nodes[node]):
                if place not in known:
                    known[place] = len(self._targets)
                    self._predictors.append(row_of[prefixes.parents[place]])
                    self._targets.append(prefixes.tokens[place])
                    self._firsts.append((tree.nodes[node], offset))
                    self._first_places.append(start + offset)
                self._predictions.append(known[place])
            where = TokenSlice(index, node, start, len(self._predictions))
            self._trained.append((where, tree.nodes[node], credit, appraisal))

    def build(self) -> MicroBatch:
        engine = [
            node.engine_logprobs if node.sampled else np.zeros(len(node), dtype=np.float32)
            for _, node, _, _ in self._trained
        ]
        weights = self._gather(lambda credit, _: credit.weights, torch.float64)
        advantages = self._gather(lambda credit, _: credit.advantages, torch.float32)
        assert weights is not None
        assert advantages is not None
        states = self._gather(lambda _, own: own.anchor_states, torch.float32)
        return MicroBatch(
            tokens=torch.tensor(self._tokens),
            positions=torch.tensor(self._positions),
            spans=tuple(self._spans),
            predictors=torch.tensor(self._predictors),
            targets=torch.tensor(self._targets),
            predictions=torch.tensor(self._predictions),
            nodes=torch.tensor([i for i, (w, *_) in enumerate(self._trained) for _ in range(w.start, w.end)]),
            engine_logprobs=_tensor(engine, torch.float32),
            advantages=advantages,
            weights=weights,
            slices=tuple(where for where, *_ in self._trained),
            kept=_kept_rows(self._firsts),
            old_logprobs=self._gather(lambda _, own: own.old_logprobs, torch.float32),
            anchor_logprobs=self._gather(lambda _, own: own.anchor_logprobs, torch.float32),
            anchor_states=None if states is None else states[self._first_places],
            old_values=self._gather(lambda _, own: own.old_values, torch.float32),
            value_targets=self._gather(lambda credit, _: credit.value_targets, torch.float32),
            value_weights=self._gather(lambda credit, _: credit.value_weights, torch.float64),
        )

    def _gather(
        self, of: Callable[[Credit, Appraisal], Mapping[int, np.ndarray]], dtype: torch.dtype
    ) -> Tensor | None:
        """One array for all trained tokens; None where nothing is held for any of them."""
        held = [(of(credit, appraisal), where.node) for where, _, credit, appraisal in self._trained]
        if not any(own for own, _ in held):
            return None
        return _tensor([own[node] for own, node in held], dtype)


def _kept_rows(tokens: Sequence[tuple[Node, int]]) -> KeptRows | None:
    """What could have been drawn at these nodes' offsets; None where it was everything throughout."""
    truncated = [node.kept for node, _ in tokens if node.kept is not None]
    if not truncated:
        return None
    vocabulary = truncated[0].vocabulary
    everything = KeptTokens.everything(1, vocabulary)
    return KeptRows.of(
        KeptTokens.join(
            [
                everything if node.kept is None else node.kept.part(offset, offset + 1)
                for node, offset in tokens
            ]
        )
    )


def _tensor(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype)
