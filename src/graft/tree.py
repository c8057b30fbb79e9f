"""The one record that everything flows through: a tree of token spans.

A prompt is the root; what the model sampled hangs below it. A path from the root to a leaf is a sample.
Depth one is GRPO, PPO, DAPO; a completion cut into a chain is RFT; groups at every prefix are GRFT.
Cuts are positions in token ids: nobody re-tokenises text. Imports no torch.

    tree = Tree(prompt)
    group = tree.new_group()
    leaf = tree.add(ROOT, tokens, logprobs, group=group, kind=Kind.COMPLETION, stop=StopReason.EOS)
    tree.path(leaf)                     -> [0, 1]
    tree.completion(leaf)               -> token ids of the sample, prompt excluded
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from graft.errors import DataError
from graft.kept import KeptTokens
from graft.types import LogProbs, Prompt, StopReason, Tokens

ROOT = 0
"""Id of the node that holds the prompt's tokens."""

NO_PARENT = -1
NO_GROUP = -1


class Kind(StrEnum):
    """What a span is."""

    PROMPT = "prompt"
    THOUGHT = "thought"  # one segment of the chain of thought
    ANSWER = "answer"  # the final answer, the last segment of a chain
    COMPLETION = "completion"  # a whole completion, not cut


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One span of tokens. Its id is its place in `Tree.nodes`; parents come before their children."""

    tokens: Tokens
    """Ids of this span alone, read-only."""

    engine_logprobs: LogProbs
    """Log-probability of each token in the sampling distribution of the engine that drew it, nats.
    Empty where nothing was sampled: the prompt, and worked examples."""

    parent: int
    """Id of the node that this span continues; `NO_PARENT` for the root."""

    group: int
    """Id of the set of samples drawn from one state; `NO_GROUP` for the root. The nodes of a completion cut
    into a chain all keep the group of the whole completions."""

    kind: Kind
    stop: StopReason | None
    """Why sampling stopped at the end of this span; None for the root and for worked examples."""

    kept: KeptTokens | None = None
    """Which tokens could have been drawn at each place, where the engine truncated its distribution; None where all
    could. The engine's log-probabilities are of the distribution over these alone, and so are the trainer's."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sampled(self) -> bool:
        """Whether a model drew these tokens, so that they carry log-probabilities."""
        return len(self.engine_logprobs) > 0


class Tree:
    """A prompt and everything that was sampled from it."""

    __slots__ = ("_children", "_groups", "nodes", "prompt")

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.nodes: list[Node] = []
        self._children: list[list[int]] = []
        self._groups = 0
        self._append(
            Node(_read_only(prompt.tokens, np.int32), _NO_LOGPROBS, NO_PARENT, NO_GROUP, Kind.PROMPT, None)
        )

    def __len__(self) -> int:
        return len(self.nodes)

    def new_group(self) -> int:
        """Reserve an id for a set of samples that will be drawn from one state."""
        self._groups += 1
        return self._groups - 1

    def add(
        self,
        parent: int,
        tokens: Sequence[int] | Tokens,
        engine_logprobs: Sequence[float] | LogProbs | None = None,
        *,
        group: int,
        kind: Kind,
        stop: StopReason | None,
        kept: KeptTokens | None = None,
    ) -> int:
        """Hang a span below `parent` and return its id.

        Raises:
            DataError: the parent or group does not exist, the span is empty, there is not one finite
                log-probability for each token, or a token is not among those that were kept at its place.
        """
        ids = _read_only(tokens, np.int32)
        logprobs = _NO_LOGPROBS if engine_logprobs is None else _read_only(engine_logprobs, np.float32)
        reason = None if stop is None else StopReason(stop)
        node = Node(ids, logprobs, parent, group, Kind(kind), reason, kept)
        _check(node, len(self.nodes), self._groups)
        return self._append(node)

    def cut(self, leaf: int, boundaries: Sequence[int], kinds: Sequence[Kind]) -> Tree:
        """A new tree in which the span of `leaf` is a chain of `len(boundaries) + 1` spans.

        Args:
            leaf: id of a node without children.
            boundaries: positions in the span, rising, each the start of the next piece: 0 < b < len.
            kinds: one for each piece.

        The pieces keep the leaf's group; all but the last stop with `StopReason.CUT`. Ids of other nodes
        stay; the first piece takes the leaf's id and the others are appended.
        """
        node = self.nodes[leaf]
        if self._children[leaf]:
            raise DataError(f"node {leaf} has children: only a leaf can be cut into a chain")
        edges = [0, *boundaries, len(node)]
        if any(a >= b for a, b in pairwise(edges)) or len(kinds) != len(edges) - 1:
            raise DataError(
                f"boundaries {list(boundaries)} with {len(kinds)} kinds do not cut a span of {len(node)} tokens: "
                "want rising positions inside the span and one kind for each piece"
            )
        tree = Tree(self.prompt)
        tree._groups = self._groups
        pieces = [
            Node(
                node.tokens[a:b],
                node.engine_logprobs[a:b],
                node.parent,
                node.group,
                Kind(kind),
                node.stop if b == len(node) else StopReason.CUT,
                None if node.kept is None else node.kept.part(a, b),
            )
            for (a, b), kind in zip(pairwise(edges), kinds, strict=True)
        ]
        for index, other in enumerate(self.nodes[1:], start=1):
            tree._append(pieces[0] if index == leaf else other)
        parent = leaf
        for piece in pieces[1:]:
            parent = tree._append(replace(piece, parent=parent))
        return tree

    def children(self, node: int) -> Sequence[int]:
        """Ids of the spans that continue `node`, in the order they were added."""
        return self._children[node]

    def leaves(self) -> list[int]:
        """Ids of the nodes that nothing continues, the prompt excluded: one for each sample."""
        return [i for i in range(1, len(self.nodes)) if not self._children[i]]

    def endings(self) -> list[int]:
        """Leaves that complete a sample: all but those at which a path was cut and not gone on with."""
        return [leaf for leaf in self.leaves() if self.ends(leaf)]

    def ends(self, node: int) -> bool:
        """Whether a completion ends in this node, by itself or at the token limit: it is not gone on with."""
        return self.nodes[node].stop is not StopReason.CUT

    def path(self, node: int) -> list[int]:
        """Ids from the root to `node`, both included."""
        ids = [node]
        while (parent := self.nodes[ids[-1]].parent) != NO_PARENT:
            ids.append(parent)
        return ids[::-1]

    def completion(self, leaf: int) -> Tokens:
        """Token ids of the sample that ends in `leaf`, prompt excluded."""
        return np.concatenate([self.nodes[i].tokens for i in self.path(leaf)[1:]])

    def completion_length(self, leaf: int) -> int:
        """Number of tokens of the sample that ends in `leaf`, prompt excluded."""
        return sum(len(self.nodes[i]) for i in self.path(leaf)[1:])

    def start(self, node: int) -> int:
        """Position of the first token of `node` in every path through it (the prompt starts at 0)."""
        return sum(len(self.nodes[i]) for i in self.path(node)[:-1])

    def siblings(self, group: int) -> list[int]:
        """Ids of the nodes that stand for one sample each in `group`: for a chain its first span."""
        return [
            i
            for i, node in enumerate(self.nodes)
            if node.group == group and self.nodes[node.parent].group != group
        ]

    def groups(self) -> list[int]:
        """Ids of all groups that have members, rising."""
        return sorted({node.group for node in self.nodes} - {NO_GROUP})

    def depth_first(self) -> Iterator[int]:
        """Ids so that each node is followed by all of its descendants: the order in which trees are packed."""
        stack = [ROOT]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(self._children[node]))

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens that a model drew, each span counted once."""
        return sum(len(node) for node in self.nodes if node.sampled)

    def to_json(self) -> dict[str, Any]:
        """What `trees.jsonl` holds of the spans; `from_json` gives the same tree back, to the bit."""
        return {
            "groups": self._groups,
            "nodes": [
                {
                    "parent": node.parent,
                    "group": node.group,
                    "kind": str(node.kind),
                    "stop": None if node.stop is None else str(node.stop),
                    "tokens": node.tokens.tolist(),
                    "engine_logprobs": [float(f"{x:.9g}") for x in node.engine_logprobs.tolist()],
                    **({} if node.kept is None else {"kept": node.kept.to_json()}),
                }
                for node in self.nodes
            ],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], prompt: Prompt) -> Tree:
        """Read what `to_json` wrote.

        Raises:
            DataError: a field is missing, of the wrong type, or the nodes do not form a tree below the prompt.
        """
        tree = cls(prompt)
        try:
            tree._groups = int(record["groups"])
            root, *rest = record["nodes"]
            if list(root["tokens"]) != prompt.tokens.tolist() or root["parent"] != NO_PARENT:
                raise DataError("the record's first node is not the given prompt")
            for entry in rest:
                tree.add(
                    int(entry["parent"]),
                    entry["tokens"],
                    entry["engine_logprobs"] or None,
                    group=int(entry["group"]),
                    kind=Kind(entry["kind"]),
                    stop=None if entry["stop"] is None else StopReason(entry["stop"]),
                    kept=KeptTokens.from_json(entry["kept"]) if "kept" in entry else None,
                )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not a tree record: {type(error).__name__}: {error}") from error
        return tree

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        self._children.append([])
        if node.parent != NO_PARENT:
            self._children[node.parent].append(len(self.nodes) - 1)
        return len(self.nodes) - 1


@dataclass(slots=True)
class Grown:
    """A tree, and how it grew."""

    tree: Tree
    survivors: list[int] = field(default_factory=list)
    """The nodes that were chosen of their groups, one a depth; empty where the tree goes on from all."""

    groups_redrawn: int = 0
    """Draws of groups that were thrown away because their scores were all equal."""

    tokens_redrawn: int = 0
    """Tokens of these draws."""


def _read_only(values: Sequence[float] | np.ndarray, dtype: type) -> np.ndarray:
    array = np.array(values, dtype=dtype)  # a copy: freezing must not reach into the caller's array
    if array.ndim != 1:
        raise DataError(f"a span must be one-dimensional, got shape {array.shape}")
    array.setflags(write=False)
    return array


_NO_LOGPROBS: LogProbs = _read_only([], np.float32)


def _check(node: Node, nodes: int, groups: int) -> None:
    where = f"node {nodes}"
    if not 0 <= node.parent < nodes:
        raise DataError(f"{where}: parent {node.parent} does not exist; there are nodes 0 to {nodes - 1}")
    if not 0 <= node.group < groups:
        raise DataError(f"{where}: group {node.group} does not exist; take an id from new_group()")
    if node.kind is Kind.PROMPT:
        raise DataError(f"{where}: only the root is a prompt")
    if len(node.tokens) == 0:
        raise DataError(f"{where}: a span needs at least one token")
    if int(node.tokens.min()) < 0:
        raise DataError(f"{where}: token ids must not be negative, got {int(node.tokens.min())}")
    if node.sampled and len(node.engine_logprobs) != len(node.tokens):
        raise DataError(
            f"{where}: {len(node.engine_logprobs)} log-probabilities for {len(node.tokens)} tokens; want one each"
        )
    if not np.isfinite(node.engine_logprobs).all():
        raise DataError(f"{where}: log-probabilities must be finite")
    if node.kept is not None:
        if not node.sampled or len(node.kept) != len(node.tokens):
            raise DataError(
                f"{where}: kept tokens for {len(node.kept)} places, {len(node.tokens)} tokens and "
                f"{len(node.engine_logprobs)} log-probabilities; want one each"
            )
        inside = node.kept.contain(node.tokens)
        if not inside.all():
            place = int(inside.argmin())
            raise DataError(
                f"{where}: token {int(node.tokens[place])} at place {place} is not among those kept there"
            )
