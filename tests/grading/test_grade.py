"""Trees -> grades of their leaves: order, counts, and how many may fail."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from graft.errors import GraderError
from graft.grading.beside import GradingBeside
from graft.grading.grade import LeafGrades, sample_of
from graft.tree import ROOT, Kind, Tree
from graft.types import Grade, Grader, Outcome, Prompt, Sample, StopReason


def new_tree(row: int) -> Tree:
    return Tree(
        Prompt(row=row, messages=(), item={"row": row}, tokens=np.array([1, 2], np.int32), question=str(row))
    )


def add(tree: Tree, parent: int, *tokens: int, stop: StopReason | None = StopReason.EOS) -> int:
    return tree.add(
        parent, tokens, [-1.0] * len(tokens), group=tree.new_group(), kind=Kind.THOUGHT, stop=stop
    )


def decode(tokens: np.ndarray) -> str:
    return "-".join(map(str, tokens.tolist()))


def grade_trees(grader: Grader, trees: Sequence[Tree], *, max_failure_rate: float) -> list[LeafGrades]:
    with GradingBeside(grader, decode) as beside:
        return beside.grades(trees, max_failure_rate=max_failure_rate)


@pytest.fixture
def trees() -> list[Tree]:
    """Two trees; in the second the first leaf has the highest id."""
    flat = new_tree(7)
    add(flat, ROOT, 10)
    add(flat, ROOT, 11, 12, stop=StopReason.LENGTH)
    deep = new_tree(8)
    fork = add(deep, ROOT, 20, stop=StopReason.CUT)
    add(deep, ROOT, 21)
    add(deep, fork, 22, 23)
    return [flat, deep]


def test_samples_are_the_paths_in_the_order_of_their_leaves(trees):
    samples = [sample_of(tree, leaf, decode) for tree in trees for leaf in tree.leaves()]
    assert [(s.prompt.row, s.text, s.tokens) for s in samples] == [
        (7, "10", 1),
        (7, "11-12", 2),
        (8, "21", 1),
        (8, "20-22-23", 3),
    ]
    assert [s.stop for s in samples] == [StopReason.EOS, StopReason.LENGTH, StopReason.EOS, StopReason.EOS]


def test_grades_find_their_leaves(trees):
    def grader(samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(float(s.text.split("-")[-1])) for s in samples]

    grades = grade_trees(grader, trees, max_failure_rate=0.0)
    assert [{leaf: g.score for leaf, g in own.items()} for own in grades] == [
        {1: 10.0, 2: 12.0},
        {2: 21.0, 3: 23.0},
    ]


@pytest.mark.parametrize(
    ("failures", "rate", "stops"),
    [
        (0, 0.0, False),
        (1, 0.0, True),
        (1, 0.24, True),
        (1, 0.25, False),  # that share is allowed, a larger one is not
        (2, 0.25, True),
        (4, 1.0, False),
    ],
)
def test_the_share_that_may_fail(trees, failures, rate, stops):
    def grader(samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(None, Outcome.CRASHED) if next(asked) < failures else Grade(1.0) for _ in samples]

    asked = itertools.count()

    if stops:
        with pytest.raises(
            GraderError, match=rf"{failures} of 4 samples .* grading\.max_failure_rate = {rate:g}\)"
        ):
            grade_trees(grader, trees, max_failure_rate=rate)
    else:
        grades = grade_trees(grader, trees, max_failure_rate=rate)
        assert sum(not g.scored for own in grades for g in own.values()) == failures


def test_the_models_own_failures_are_scores(trees):
    def grader(samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(0.0, Outcome.UNPARSEABLE, reason="no number")] * len(samples)

    grades = grade_trees(grader, trees, max_failure_rate=0.0)
    assert all(g.score == 0.0 for own in grades for g in own.values())


def test_the_message_counts_the_reasons(trees):
    reasons = ["slow", "down", "slow", "slow"]

    def grader(samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(None, Outcome.TIMED_OUT, reason=next(told)) for _ in samples]

    told = iter(reasons)

    with pytest.raises(GraderError, match=r"3 x timed_out: slow; 1 x timed_out: down"):
        grade_trees(grader, trees, max_failure_rate=0.5)


def test_no_trees():
    assert grade_trees(lambda samples: [], [], max_failure_rate=0.0) == []
