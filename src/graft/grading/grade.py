"""Trees -> grades of their leaves, and the policy for what could not be graded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from graft.errors import GraderError
from graft.tree import Tree
from graft.types import Grade, Sample, StopReason, Tokens

LeafGrades = Mapping[int, Grade]
"""Leaf id -> its grade."""


def sample_of(tree: Tree, leaf: int, decode: Callable[[Tokens], str]) -> Sample:
    """The path that ends in a leaf."""
    return Sample(
        prompt=tree.prompt,
        text=decode(tree.completion(leaf)),
        tokens=tree.completion_length(leaf),
        stop=tree.nodes[leaf].stop or StopReason.EOS,
    )


def settle(trees: Sequence[Tree], grades: Sequence[Grade], *, max_failure_rate: float) -> list[LeafGrades]:
    """Hang grades on the leaves that they belong to, unless too many of them failed.

    Args:
        trees: grown trees.
        grades: one for each sample, tree by tree, leaves in rising order.
        max_failure_rate: largest share of them that may have failed.

    A sample without a score leaves its group and is counted; it is not a zero.

    Raises:
        GraderError: more than `max_failure_rate` could not be graded; the message counts the reasons.
    """
    failed = [grade for grade in grades if grade.failed]
    if len(failed) > max_failure_rate * len(grades):
        reasons = Counter(f"{grade.outcome}: {grade.reason}" for grade in failed).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise GraderError(
            f"{len(failed)} of {len(grades)} samples could not be graded (allowed: grading.max_failure_rate = "
            f"{max_failure_rate:g}). {listed}"
        )
    remaining = iter(grades)
    return [{leaf: next(remaining) for leaf in tree.endings()} for tree in trees]
