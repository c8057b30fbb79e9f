"""Trees of whole completions -> trees of thoughts and answers -> what critics see of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from graft.errors import DataError
from graft.segments.cutter import Cutter
from graft.segments.text_stream import Decode, TextStream
from graft.tree import NO_GROUP, ROOT, Kind, Tree
from graft.types import Chain, Grade, StopReason


def cut_tree(tree: Tree, cutter: Cutter) -> Tree:
    """The same samples, each a chain of thoughts and an answer.

    Every piece keeps the group of the whole completion, and its own log-probabilities and kept sets. All but the last
    stop with `StopReason.CUT`. The leaves stand in the order of the completions: `zip(tree.leaves(), cut.leaves())`
    pairs them.

    Raises:
        DataError: a node is no whole completion below the root, or the rule needs log-probabilities and there are none.
    """
    cut = Tree(tree.prompt)
    for _ in range(max((node.group for node in tree.nodes), default=NO_GROUP) + 1):
        cut.new_group()
    for number, node in enumerate(tree.nodes[1:], start=1):
        if node.kind is not Kind.COMPLETION or node.parent != ROOT:
            raise DataError(
                f"node {number} is of kind {node.kind} below node {node.parent}: want whole completions below the "
                "root; a tree is cut once"
            )
        logprobs = node.engine_logprobs if node.sampled else None
        boundaries, kinds = cutter.cut(tree.prompt.tokens, node.tokens, logprobs, node.stop)
        parent = ROOT
        for (a, b), kind in zip(pairwise([0, *boundaries, len(node)]), kinds, strict=True):
            parent = cut.add(
                parent,
                node.tokens[a:b],
                None if logprobs is None else logprobs[a:b],
                group=node.group,
                kind=kind,
                stop=node.stop if b == len(node) else StopReason.CUT,
                kept=None if node.kept is None else node.kept.part(a, b),
            )
    return cut


def chains_of(
    tree: Tree, grades: Mapping[int, Grade], decode: Decode, *, tags: Sequence[str] = ()
) -> dict[int, Chain]:
    """Leaf id -> its chain, in rising order. Arguments as for `chain_of`; leaves without a grade have none."""
    return {leaf: chain_of(tree, leaf, grades.get(leaf), decode, tags=tags) for leaf in tree.leaves()}


def chain_of(
    tree: Tree, node: int, grade: Grade | None, decode: Decode, *, tags: Sequence[str] = ()
) -> Chain:
    """The path that ends in a node, which may still grow.

    Args:
        tree: of thoughts and answers.
        node: last node of the path; the root gives a chain without thoughts.
        grade: of the whole completion.
        decode: token ids -> text. A character whose bytes lie in two nodes belongs to the later one.
        tags: spellings that are left out of the texts, e.g. the tags around thoughts.

    Raises:
        DataError: a node of the path is a whole completion, or follows an answer.
    """
    path = tree.path(node)[1:]
    kinds = [tree.nodes[i].kind for i in path]
    if any(kind is Kind.COMPLETION for kind in kinds) or Kind.ANSWER in kinds[:-1]:
        raise DataError(
            f"node {node} ends a path of {', '.join(kinds)}: want thoughts and then an answer; see cut_tree"
        )
    stream = TextStream(decode)
    texts = [stream.feed(tree.nodes[i].tokens) for i in path]
    if texts:
        texts[-1] += stream.end()
    for tag in tags:
        texts = [text.replace(tag, "") for text in texts]
    answered = kinds[-1:] == [Kind.ANSWER]
    return Chain(
        prompt=tree.prompt,
        thoughts=tuple(texts[:-1] if answered else texts),
        answer=texts[-1] if answered else None,
        spans=tuple(tree.nodes[i].tokens for i in path),
        grade=grade,
    )
