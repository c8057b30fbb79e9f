"""Credit of segments by hand: RFT's and process GRPO's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graft.algorithm_settings import RFT, ProcessGRPO, Rewards
from graft.crediting import Evidence
from graft.crediting_facts import correlation
from graft.crediting_segments import credit_process, credit_segments
from graft.tree import ROOT, Kind, Tree
from graft.types import Appraisal, Critique, Grade, Outcome
from tests.test_algorithms import flat, group
from tests.trees import add_chain, add_segment

CRITIC: dict[str, Any] = {"std_epsilon": 1e-12, "dampen": 1.0}


def chain() -> tuple[Tree, Evidence]:
    """Two thoughts of 2 and 1 tokens and an answer of 3."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    *_, three = add_chain(tree, top, 2, 1, 3)
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
    assert credit.facts["standardised_thought_mean"] == pytest.approx(0.0)
    assert credit.facts["standardised_thought_absolute_mean"] == pytest.approx(1.0)


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


def test_returns_over_segments():
    """λ = 1, γ = 1/2 on rewards 11, 9, 10: Y = 11 + 7, 9 + 5, 10; A against the values 0.5, 1, 2 at sampling."""
    _, evidence = chain()
    settings = RFT_BY_HAND.model_copy(update={"gae_lambda": 1.0})
    credit = credit_segments(evidence, settings)
    [own] = credit.trees
    assert {n: t[0] for n, t in own.value_targets.items()} == {1: 18.0, 2: 14.0, 3: 10.0}
    assert {n: a[0] for n, a in own.advantages.items()} == {1: 17.5, 2: 13.0, 3: 8.0}


def test_advantages_are_whitened_over_the_batch():
    """Advantages 11, 9, 8 by hand above: mean 28/3; values' targets stay as they are."""
    _, evidence = chain()
    plain, whitened = (
        credit_segments(evidence, RFT_BY_HAND.model_copy(update={"whiten": on})) for on in (False, True)
    )
    spread = np.std([11.0, 9.0, 8.0], ddof=1)
    expected = [(own - 28 / 3) / spread for own in (11.0, 9.0, 8.0)]
    assert [whitened.trees[0].advantages[n][0] for n in (1, 2, 3)] == pytest.approx(expected)
    assert [whitened.details[0][n]["A"] for n in (1, 2, 3)] == pytest.approx(expected)
    for n in (1, 2, 3):
        assert whitened.trees[0].value_targets[n].tolist() == plain.trees[0].value_targets[n].tolist()


def two_completions() -> tuple[Tree, Evidence]:
    """One with a thought and an answer, one that was cut off in its second thought."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    _, two = add_chain(tree, top, 2, 1)
    three = add_segment(tree, ROOT, 1, top, Kind.THOUGHT)
    four = add_segment(tree, three, 4, top, Kind.THOUGHT)
    critiques = {two: Critique(10.0, (8.0,), (5.0,)), four: Critique(0.0, (4.0, 4.0), (3.0, 3.0))}
    values = {n: np.full(len(tree.nodes[n]), n, dtype=np.float32) for n in range(1, 5)}
    grades = {two: Grade(1.0), four: Grade(0.0)}
    return tree, Evidence([tree], [grades], critiques=[critiques], appraisals=[Appraisal(old_values=values)])


def test_a_completion_that_was_cut_off_has_no_reward_of_an_answer():
    """Equal scores and progress: C = G. Rewards 10, 10 and 0, 0; Y_k = R_k + V_{k+1}, nothing behind the last."""
    _, evidence = two_completions()
    credit = credit_segments(evidence, RFT(rewards=Rewards(whiten="none")))
    rewards = {node: own["R"] for node, own in credit.details[0].items()}
    assert rewards == {1: 10.0, 2: 10.0, 3: 0.0, 4: 0.0}
    assert {node: own["Y"] for node, own in credit.details[0].items()} == {1: 12.0, 2: 10.0, 3: 4.0, 4: 0.0}
    assert ["S" in credit.details[0][node] for node in (1, 2, 3, 4)] == [True, False, True, True]


def test_every_segment_weighs_a_share_of_its_completions():
    tree, evidence = two_completions()
    credit = credit_segments(evidence, RFT())
    [own] = credit.trees
    assert {n: w.sum() for n, w in own.weights.items()} == pytest.approx(dict.fromkeys((1, 2, 3, 4), 0.5))
    assert {n: w.tolist() for n, w in own.value_weights.items()} == {
        n: [0.5] + [0.0] * (len(tree.nodes[n]) - 1) for n in (1, 2, 3, 4)
    }
    assert (credit.denominators, credit.groups) == ([2.0], 0)


def test_what_is_reported_of_critic_and_values():
    _, evidence = two_completions()
    facts = credit_segments(evidence, RFT(rewards=Rewards(whiten="none"))).facts
    # values 1, 2, 3, 4 against targets 12, 10, 4, 0: differences 11, 8, 1, -4, mean 4; targets' mean 6.5
    unexplained = (7**2 + 4**2 + 3**2 + 8**2) / (5.5**2 + 3.5**2 + 2.5**2 + 6.5**2)
    assert facts == pytest.approx(
        {
            "segments_per_completion": 2.0,
            "critic_thought_mean": 16 / 3,
            "critic_progress_mean": 11 / 3,
            "critic_overall_mean": 5.0,
            "standardised_thought_mean": 0.0,
            "standardised_thought_absolute_mean": 0.0,
            "progress_effect_mean": 0.0,
            "critic_agreement": 1.0,  # means 8 and 4, grades 1 and 0
            "value_explained_variance": 1 - unexplained,
        }
    )


def test_a_completion_without_a_grade_has_no_part():
    _, evidence = two_completions()
    ungraded = Evidence(
        evidence.trees,
        [{**evidence.grades[0], 4: Grade(None, Outcome.CRASHED)}],
        critiques=evidence.critiques,
        appraisals=evidence.appraisals,
    )
    [own] = credit_segments(ungraded, RFT()).trees
    assert {n: w.sum() for n, w in own.weights.items()} == {1: 1.0, 2: 1.0}


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
    one, two, three = add_chain(tree, top, 2, 1, 1)
    four, five = add_chain(tree, top, 3, 1)
    critiques = {three: Critique(10.0, (10.0, 0.0), (0.0, 0.0)), five: Critique(0.0, (4.0,), (0.0,))}
    grades = {three: Grade(1.0), five: Grade(0.0)}
    evidence = Evidence([tree], [grades], critiques=[critiques])
    credit = credit_process(evidence, ProcessGRPO(scale="none"))
    [own] = credit.trees
    # 5.2, -4.8, 5.2 and -0.8, -4.8; both completions have 4 tokens
    assert {n: a[0] for n, a in own.advantages.items()} == pytest.approx(
        {one: 5.6, two: 0.4, three: 5.2, four: -5.6, five: -4.8}
    )
    assert {n: w.tolist() for n, w in own.weights.items()} == {
        n: [1 / 8] * len(tree.nodes[n]) for n in (one, two, three, four, five)
    }
    # thoughts' means 5 and 4, grades 1 and 0
    assert credit.facts == pytest.approx(
        {
            "segments_per_completion": 2.5,
            "critic_thought_mean": 14 / 3,
            "critic_overall_mean": 5.0,
            "critic_agreement": 1.0,
        }
    )
    alike = {leaf: Critique(5.0, (5.0,) * len(c.thoughts), c.progress) for leaf, c in critiques.items()}
    nothing = credit_process(Evidence([tree], [grades], critiques=[alike]), ProcessGRPO())
    assert (nothing.groups, nothing.groups_with_signal, flat(nothing.trees[0])) == (1, 0, {})
    assert "critic_agreement" not in nothing.facts
    ungraded = dict.fromkeys(grades, Grade(None, Outcome.CRASHED))
    assert credit_process(Evidence([tree], [ungraded], critiques=[critiques]), ProcessGRPO()).facts == {}


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [3, 3, 3]) is None
    assert correlation([1], [2]) is None
    assert correlation([0, 1, 0, 1], [0, 1, 1, 0]) == pytest.approx(0.0)
