"""Credit of segments and of trees by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graft.algorithm_settings import GRFT, GRPO, RFT, ProcessGRPO, Rewards, ThoughtRewards
from graft.crediting import Evidence, credit_relative
from graft.crediting_segments import correlation, credit_process, credit_segments
from graft.crediting_trees import credit_siblings, critic_scores, outcome_values
from graft.tree import ROOT, Kind, Tree
from graft.types import Appraisal, Critique, Grade, Outcome, StopReason
from tests.test_algorithms import flat, graded, group

OUTCOME = GRFT(shape="tree", branching=(2, 2), score="outcome", scale="none")


def add(tree: Tree, parent: int, length: int, number: int, kind: Kind) -> int:
    stop = StopReason.EOS if kind is Kind.ANSWER else StopReason.CUT
    return tree.add(parent, [5] * length, [-1.0] * length, group=number, kind=kind, stop=stop)


def two_by_two() -> tuple[Tree, list[int]]:
    """Two thoughts, each with two answers: nodes 1, 2 below the prompt, 3, 4 below 1, 5, 6 below 2."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    thoughts = [add(tree, ROOT, 2, top, Kind.THOUGHT), add(tree, ROOT, 3, top, Kind.THOUGHT)]
    leaves = []
    for thought in thoughts:
        below = tree.new_group()
        leaves += [add(tree, thought, 1, below, Kind.ANSWER), add(tree, thought, 4, below, Kind.ANSWER)]
    return tree, leaves


def test_outcomes_are_backed_up_the_tree():
    tree, leaves = two_by_two()
    grades = dict(zip(leaves, map(Grade, (1.0, 0.0, 1.0, 1.0)), strict=True))
    assert outcome_values(tree, grades) == {1: 0.5, 2: 1.0, 3: 1.0, 4: 0.0, 5: 1.0, 6: 1.0}
    grades[3] = Grade(None, Outcome.CRASHED)
    assert outcome_values(tree, grades) == {1: 0.0, 2: 1.0, 4: 0.0, 5: 1.0, 6: 1.0}


def test_siblings_by_hand():
    """Values 1/2 and 1 above, 1 and 0 below the first thought; the second thought's answers are alike.

    Weights: one prompt, two nodes at depth 1, four at depth 2, spread over a node's tokens."""
    tree, leaves = two_by_two()
    grades = dict(zip(leaves, map(Grade, (1.0, 0.0, 1.0, 1.0)), strict=True))
    credit = credit_siblings(Evidence([tree], [grades]), OUTCOME)
    [own] = credit.trees
    assert flat(own) == {
        1: ([-0.25] * 2, [1 / 4] * 2),
        2: ([0.25] * 3, [pytest.approx(1 / 6)] * 3),
        3: ([0.5], [1 / 4]),
        4: ([-0.5] * 4, [1 / 16] * 4),
    }
    assert (credit.groups, credit.groups_with_signal) == (3, 2)
    assert credit.details[0][3] == {"value": 1.0, "A": 0.5}


def test_shifting_a_groups_scores_changes_nothing_and_permuting_permutes():
    tree, leaves = two_by_two()

    def advantages(*scores: float) -> list[float]:
        grades = dict(zip(leaves, map(Grade, scores), strict=True))
        [own] = credit_siblings(Evidence([tree], [grades]), GRFT(shape="tree", score="outcome")).trees
        return [float(own.advantages[node][0]) if node in own.advantages else 0.0 for node in leaves]

    assert advantages(1.0, 0.0, 0.5, 0.25) == pytest.approx(advantages(11.0, 10.0, 0.5, 0.25))
    a, b, c, d = advantages(1.0, 0.0, 0.5, 0.25)
    assert advantages(0.0, 1.0, 0.25, 0.5) == pytest.approx([b, a, d, c])


def test_depth_one_with_grades_as_scores_is_grpo_to_the_bit():
    trees = [group(2, 5, 1, 3), group(4, 4, 2, 1, row=1), group(1, 1, 1, 1, row=2)]
    grades = [graded(1.0, 0.0, 0.3, 1.0), graded(0.0, 0.1, 0.1, 0.7), graded(1.0, 1.0, 1.0, 1.0)]
    for scale in ("group_std", "batch_std", "none"):
        ours = credit_siblings(
            Evidence(trees, grades), GRFT(shape="tree", branching=(4,), score="outcome", scale=scale)
        )
        theirs = credit_relative(Evidence(trees, grades), GRPO(group_size=4, scale=scale))
        assert (ours.groups, ours.groups_with_signal) == (theirs.groups, theirs.groups_with_signal)
        for own, other in zip(ours.trees, theirs.trees, strict=True):
            assert flat(own) == flat(other)


CRITIC: dict[str, Any] = {"std_epsilon": 1e-12, "dampen": 1.0}


def test_critic_scores_by_hand():
    """A chain: two thoughts, the first goes on to a thought and an answer."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    first, second = add(tree, ROOT, 1, top, Kind.THOUGHT), add(tree, ROOT, 1, top, Kind.THOUGHT)
    below = tree.new_group()
    third, answer = add(tree, first, 1, below, Kind.THOUGHT), add(tree, first, 1, below, Kind.ANSWER)
    critiques = {
        second: Critique(None, (2.0,), (0.0,)),
        third: Critique(None, (10.0, 6.0), (4.0, 8.0)),
        answer: Critique(10.0, (10.0,), (4.0,)),
    }
    rewards = ThoughtRewards(**CRITIC, answer_scale=0.5)
    scores = critic_scores(tree, {answer: Grade(1.0)}, critiques, rewards, scale=10.0)
    # 10 and 2: z = 1 and -1, no progress before them. Then one thought alone: z = 0; ΔP = 8 - 4, E = 2 · 8 / 10,
    # m = 6 / 10. The answer: ρ G.
    assert {node: score for node, (score, _) in scores.items()} == pytest.approx(
        {first: 1.0, second: -1.0, third: 0.96, answer: 5.0}
    )
    assert scores[third][1] == pytest.approx({"S": 6.0, "P": 8.0, "Ŝ": 0.0, "E": 1.6, "Q": 0.96})
    critiques[second] = Critique(outcome=Outcome.CRASHED)
    scores = critic_scores(tree, {answer: Grade(None, Outcome.CRASHED)}, critiques, rewards, scale=10.0)
    assert set(scores) == {first, third}


def test_mixed_scores_are_a_weighted_sum():
    tree, leaves = two_by_two()
    grades = dict(zip(leaves, map(Grade, (1.0, 0.0, 1.0, 1.0)), strict=True))
    critiques = {
        leaf: Critique(10 * (grades[leaf].score or 0.0), (8.0 if leaf < 5 else 2.0,), (0.0,))
        for leaf in leaves
    }
    settings = GRFT(
        shape="tree", score="mixed", outcome_weight=0.25, scale="none", rewards=ThoughtRewards(**CRITIC)
    )
    credit = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings)
    # thoughts: 0.25 · 0.5 + 0.75 · 1 and 0.25 · 1 - 0.75; answers 0.25 + 0.75 · 10 and 0
    assert [credit.details[0][n]["value"] for n in (1, 2, 3, 4)] == pytest.approx([0.875, -0.5, 7.75, 0.0])


def test_nothing_to_compare():
    tree, leaves = two_by_two()
    failed = dict.fromkeys(leaves, Grade(None, Outcome.CRASHED))
    credit = credit_siblings(Evidence([tree], [failed]), OUTCOME)
    assert (credit.groups, flat(credit.trees[0]), credit.denominators) == (0, {}, [0.0])


def chain() -> tuple[Tree, Evidence]:
    """Two thoughts of 2 and 1 tokens and an answer of 3."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    one = add(tree, ROOT, 2, top, Kind.THOUGHT)
    two = add(tree, one, 1, top, Kind.THOUGHT)
    three = add(tree, two, 3, top, Kind.ANSWER)
    values = {1: np.array([0.5, 9, 9]), 2: np.array([1.0]), 3: np.array([2.0, 9, 9])}
    appraisal = Appraisal(old_values={n: v.astype(np.float32) for n, v in values.items()})
    critique = Critique(10.0, (10.0, 0.0), (4.0, 8.0))
    return tree, Evidence(
        [tree], [{three: Grade(1.0)}], critiques=[{three: critique}], appraisals=[appraisal]
    )


RFT_BY_HAND = RFT(gamma=0.5, rewards=Rewards(**CRITIC, whiten="none"))


def test_segments_by_hand():
    """S = 10, 0: Ŝ = 1, -1. P = 4, 8: ΔP = 0, 4, but m_2 = 0, so Q = 0. C = 11, 9; R_3 = 10.

    γ = 1/2, values 0.5, 1, 2: Y = 11 + 0.5, 9 + 1, 10; A = Y - V."""
    _, evidence = chain()
    credit = credit_segments(evidence, RFT_BY_HAND)
    [own] = credit.trees
    assert {n: a.tolist() for n, a in own.advantages.items()} == {1: [11.0] * 2, 2: [9.0], 3: [8.0] * 3}
    assert {n: w.tolist() for n, w in own.weights.items()} == {
        1: [0.5] * 2,
        2: [1.0],
        3: [pytest.approx(1 / 3)] * 3,
    }
    assert {n: t[0] for n, t in own.value_targets.items()} == {1: 11.5, 2: 10.0, 3: 10.0}
    assert {n: w.tolist() for n, w in own.value_weights.items()} == {1: [1, 0], 2: [1], 3: [1, 0, 0]}
    assert credit.details[0][2] == pytest.approx(
        {"S": 0, "P": 8, "Ŝ": -1, "E": 1.6, "Q": 0, "C": 9, "R": 9, "V": 1, "Y": 10, "A": 9}
    )
    assert credit.details[0][3] == {"R": 10, "V": 2, "Y": 10, "A": 8}
    assert credit.facts["segments_per_completion"] == 3


def test_shared_overall_and_whitening_over_the_batch():
    _, evidence = chain()
    shared = RFT(gamma=0.5, rewards=Rewards(**CRITIC, overall="shared", whiten="none"))
    credit = credit_segments(evidence, shared)
    assert [credit.details[0][n]["R"] for n in (1, 2, 3)] == pytest.approx([6.0, 4.0, 10.0])
    scaled = credit_segments(evidence, RFT(rewards=Rewards(**CRITIC)))
    spread = np.std([11.0, 9.0, 10.0], ddof=1)
    assert [scaled.details[0][n]["R"] for n in (1, 2, 3)] == pytest.approx(
        [11 / spread, 9 / spread, 10 / spread]
    )


def test_a_completion_that_the_critic_failed_on_has_no_part():
    tree, evidence = chain()
    [leaf] = tree.leaves()
    failed = Evidence(
        evidence.trees,
        evidence.grades,
        critiques=[{leaf: Critique(outcome=Outcome.TIMED_OUT)}],
        appraisals=evidence.appraisals,
    )
    credit = credit_segments(failed, RFT())
    assert (flat(credit.trees[0]), credit.denominators) == ({}, [0.0])


def test_process_supervision_by_hand():
    """Two completions of one group. Step rewards 10, 0 and G = 10; 4 and G = 0: mean 4.8. Sums over later steps."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    one = add(tree, ROOT, 2, top, Kind.THOUGHT)
    two = add(tree, one, 1, top, Kind.THOUGHT)
    three = add(tree, two, 1, top, Kind.ANSWER)
    four = add(tree, ROOT, 3, top, Kind.THOUGHT)
    five = add(tree, four, 1, top, Kind.ANSWER)
    critiques = {three: Critique(10.0, (10.0, 0.0), (0.0, 0.0)), five: Critique(0.0, (4.0,), (0.0,))}
    grades = {three: Grade(1.0), five: Grade(0.0)}
    evidence = Evidence([tree], [grades], critiques=[critiques])
    [own] = credit_process(evidence, ProcessGRPO(scale="none")).trees
    # 5.2, -4.8, 5.2 and -0.8, -4.8; both completions have 4 tokens
    assert {n: a[0] for n, a in own.advantages.items()} == pytest.approx(
        {one: 5.6, two: 0.4, three: 5.2, four: -5.6, five: -4.8}
    )
    assert {n: w.tolist() for n, w in own.weights.items()} == {
        n: [1 / 8] * len(tree.nodes[n]) for n in (one, two, three, four, five)
    }
    alike = {leaf: Critique(5.0, (5.0,) * len(c.thoughts), c.progress) for leaf, c in critiques.items()}
    nothing = credit_process(Evidence([tree], [grades], critiques=[alike]), ProcessGRPO())
    assert (nothing.groups, nothing.groups_with_signal, flat(nothing.trees[0])) == (1, 0, {})


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [3, 3, 3]) is None
    assert correlation([1], [2]) is None
    assert correlation([0, 1, 0, 1], [0, 1, 1, 0]) == pytest.approx(0.0)
