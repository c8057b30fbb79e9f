"""Trees -> grades of their leaves, and the policy for what could not be graded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from graft.errors import GraderError
from graft.tree import Tree
from graft.types import Grade, Grader, Sample, StopReason, Tokens

LeafGrades = Mapping[int, Grade]
"""Leaf id -> its grade."""


def samples_of(trees: Sequence[Tree], decode: Callable[[Tokens], str]) -> list[Sample]:
    """One sample for each leaf, tree by tree, leaves in rising order."""
    return [sample_of(tree, leaf, decode) for tree in trees for leaf in tree.leaves()]


def sample_of(tree: Tree, leaf: int, decode: Callable[[Tokens], str]) -> Sample:
    """The path that ends in a leaf."""
    return Sample(
        prompt=tree.prompt,
        text=decode(tree.completion(leaf)),
        tokens=tree.completion_length(leaf),
        stop=tree.nodes[leaf].stop or StopReason.EOS,
    )


def grade_trees(
    grader: Grader, trees: Sequence[Tree], decode: Callable[[Tokens], str], *, max_failure_rate: float
) -> list[LeafGrades]:
    """Grade every leaf.

    A sample without a score leaves its group and is counted; it is not a zero. Raises what `settle` raises.

    Args:
        grader: what judges.
        trees: grown trees.
        decode: token ids -> text.
        max_failure_rate: largest share of samples without a score.

    Raises:
        GraderError: more than that share could not be graded; the message counts the reasons.
    """
    samples = samples_of(trees, decode)
    grades = list(grader(samples))
    if len(grades) != len(samples):
        raise GraderError(
            f"the grader returned {len(grades)} grades for {len(samples)} samples; want one each"
        )
    return settle(trees, grades, max_failure_rate=max_failure_rate)


def settle(trees: Sequence[Tree], grades: Sequence[Grade], *, max_failure_rate: float) -> list[LeafGrades]:
    """Hang the grades of `samples_of(trees)` on their leaves, unless too many of them failed.

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
    return [{leaf: next(remaining) for leaf in tree.leaves()} for tree in trees]
