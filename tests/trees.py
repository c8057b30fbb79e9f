"""Random trees with credit, for tests of everything that flows through them."""

from __future__ import annotations

import numpy as np

from graft.kept import KeptTokens, entry_of
from graft.tree import ROOT, Kind, Tree
from graft.types import Credit, Prompt, StopReason


def random_prompt(
    rng: np.random.Generator, *, row: int = 0, length: int = 6, vocabulary: int = 300
) -> Prompt:
    return Prompt(
        row=row,
        messages=({"role": "user", "content": f"question {row}"},),
        item={"answer": "4"},
        tokens=rng.integers(3, vocabulary, length).astype(np.int32),
        question=f"question {row}",
    )


def add_span(
    tree: Tree, rng: np.random.Generator, parent: int, group: int, length: int, *, vocabulary: int = 300
) -> int:
    return tree.add(
        parent,
        rng.integers(3, vocabulary, length).astype(np.int32),
        -rng.random(length).astype(np.float32),
        group=group,
        kind=Kind.THOUGHT,
        stop=StopReason.EOS,
    )


def random_group(rng: np.random.Generator, *, row: int = 0, samples: int = 4, vocabulary: int = 300) -> Tree:
    """A prompt with whole completions of unequal lengths, one of them a single token."""
    tree = Tree(random_prompt(rng, row=row, length=int(rng.integers(3, 9)), vocabulary=vocabulary))
    group = tree.new_group()
    lengths = [1, *rng.integers(2, 9, samples - 1)]
    for length in lengths:
        add_span(tree, rng, ROOT, group, int(length), vocabulary=vocabulary)
    return tree


def random_deep_tree(
    rng: np.random.Generator, *, row: int = 0, nodes: int = 9, vocabulary: int = 300
) -> Tree:
    """Groups at random prefixes."""
    tree = Tree(random_prompt(rng, row=row, vocabulary=vocabulary))
    while len(tree) < nodes:
        parent = int(rng.integers(0, len(tree)))
        group = tree.new_group()
        for _ in range(int(rng.integers(1, 4))):
            add_span(tree, rng, parent, group, int(rng.integers(1, 7)), vocabulary=vocabulary)
    return tree


def truncated(tree: Tree, rng: np.random.Generator, *, vocabulary: int = 320) -> Tree:
    """The same tree as if it had been drawn from truncated distributions: sets of all sizes, some of everything."""
    again = Tree(tree.prompt)
    for _ in range(max(tree.groups(), default=-1) + 1):
        again.new_group()
    for node in tree.nodes[1:]:
        masks = rng.random((len(node), vocabulary)) < rng.choice([0, 0.02, 0.3, 1.0], size=(len(node), 1))
        masks[np.arange(len(node)), node.tokens] = True
        kept = KeptTokens.of([entry_of(mask) for mask in masks], vocabulary)
        again.add(
            node.parent,
            node.tokens,
            node.engine_logprobs,
            group=node.group,
            kind=node.kind,
            stop=node.stop,
            kept=kept,
        )
    return again


def kept_masks(kept: KeptTokens) -> np.ndarray:
    """One flag for each place and token, asked token by token."""
    tokens = np.arange(kept.vocabulary, dtype=np.int32)
    return np.array(
        [[kept.part(i, i + 1).contain(tokens[t : t + 1])[0] for t in tokens] for i in range(len(kept))]
    )


def random_credit(tree: Tree, rng: np.random.Generator, *, share: float = 1.0) -> Credit:
    """Different numbers on every token; nodes are left untrained with probability 1 - share."""
    trained = [i for i in range(1, len(tree)) if rng.random() < share]
    return Credit(
        advantages={i: rng.normal(size=len(tree.nodes[i])).astype(np.float32) for i in trained},
        weights={i: rng.random(len(tree.nodes[i])) for i in trained},
    )


def add_segment(tree: Tree, parent: int, length: int, group: int, kind: Kind) -> int:
    """A thought or an answer of so many equal tokens below a node; its id."""
    stop = StopReason.EOS if kind is Kind.ANSWER else StopReason.CUT
    return tree.add(parent, [5] * length, [-1.0] * length, group=group, kind=kind, stop=stop)


def add_chain(tree: Tree, group: int, *lengths: int) -> list[int]:
    """A completion of thoughts and an answer of so many tokens each, below the prompt; their ids."""
    nodes = [ROOT]
    for place, length in enumerate(lengths, start=1):
        kind = Kind.ANSWER if place == len(lengths) else Kind.THOUGHT
        nodes.append(add_segment(tree, nodes[-1], length, group, kind))
    return nodes[1:]
