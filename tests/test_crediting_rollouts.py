"""Credit from rollouts by hand: VinePPO, SPO-chain and SPO-tree."""

from __future__ import annotations

import numpy as np
import pytest

from graft.algorithm_settings import SPOChain, SPOTree, VinePPO
from graft.crediting import Evidence
from graft.crediting_rollouts import credit_nodes, credit_steps
from graft.crediting_trees import credit_siblings
from graft.tree import ROOT, Kind, Tree
from graft.types import Critique, Grade, Outcome, StopReason
from tests.test_algorithms import flat, group
from tests.test_crediting_trees import OUTCOME, two_by_two
from tests.trees import add_chain, add_segment


def two_chains() -> tuple[Tree, Evidence]:
    """Two thoughts and an answer, right: nodes 1, 2, 3 of 2, 1, 3 tokens; a thought that was cut off: node 4 of 4."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    *_, three = add_chain(tree, top, 2, 1, 3)
    four = tree.add(ROOT, [5] * 4, [-0.05] * 4, group=top, kind=Kind.THOUGHT, stop=StopReason.LENGTH)
    critiques = {
        three: Critique(10.0, (5.0, 9.0), (2.5, 7.5), initial_progress=5.0),
        four: Critique(0.0, (2.5,), (2.5,), initial_progress=5.0),
    }
    return tree, Evidence([tree], [{three: Grade(1.0), four: Grade(0.0)}], critiques=[critiques])


def test_steps_by_hand():
    """V = 1/2, 1/4, 3/4 and the reward 1; V = 1/2 and the reward 0, whatever is said of the state
    after the last thought. Ten tokens."""
    _, evidence = two_chains()
    credit = credit_steps(evidence, VinePPO(whiten=False))
    assert flat(credit.trees[0]) == {
        1: ([-0.25] * 2, [0.1] * 2),
        2: ([0.5], [0.1]),
        3: ([0.25] * 3, [0.1] * 3),
        4: ([-0.5] * 4, [0.1] * 4),
    }
    assert credit.denominators == [10.0]
    assert credit.details[0][2] == {"V": 0.25, "value": 0.75, "A": 0.5}


def test_the_advantages_of_a_completion_add_up_to_its_outcome_against_the_prompts_value():
    _, evidence = two_chains()
    [own] = credit_steps(evidence, VinePPO(whiten=False)).trees
    assert sum(own.advantages[node][0] for node in (1, 2, 3)) == 1 - 0.5
    assert own.advantages[4][0] == 0 - 0.5


def test_a_completion_that_is_one_answer():
    """The critic draws nothing for it: V of the prompt comes from the others, and without any the advantage is 0."""
    tree, evidence = two_chains()
    answer = add_segment(tree, ROOT, 2, 0, Kind.ANSWER)
    grades, critiques = {**evidence.grades[0], answer: Grade(1.0)}, {answer: Critique(10.0)}
    both = Evidence([tree], [grades], critiques=[{**critiques, **evidence.critiques[0]}])
    assert credit_steps(both, VinePPO(whiten=False)).trees[0].advantages[answer].tolist() == [0.5] * 2
    alone = Evidence([tree], [grades], critiques=[critiques])
    assert flat(credit_steps(alone, VinePPO(whiten=False)).trees[0]) == {answer: ([0.0] * 2, [0.5] * 2)}


def test_a_completion_without_grade_or_critique_has_no_part():
    tree, evidence = two_chains()
    grades = {3: Grade(None, Outcome.CRASHED), 4: Grade(0.0)}
    critiques = {3: evidence.critiques[0][3], 4: Critique(outcome=Outcome.TIMED_OUT)}
    credit = credit_steps(Evidence([tree], [grades], critiques=[critiques]), VinePPO())
    assert (flat(credit.trees[0]), credit.denominators) == ({}, [0.0])


def test_the_probability_mask_leaves_likely_tokens_out_of_loss_and_mean():
    """e^-1 is below 0.9, e^-0.05 = 0.951 is not: node 4 has no part, also not in the deviation."""
    _, evidence = two_chains()
    credit = credit_steps(evidence, SPOChain(whiten=False))
    assert flat(credit.trees[0]) == {
        1: ([-0.25] * 2, [pytest.approx(1 / 6)] * 2),
        2: ([0.5], [pytest.approx(1 / 6)]),
        3: ([0.25] * 3, [pytest.approx(1 / 6)] * 3),
    }
    assert credit.denominators == [6.0]
    [whitened] = credit_steps(evidence, SPOChain()).trees
    kept = np.array([-0.25, -0.25, 0.5, 0.25, 0.25, 0.25])
    expected = (kept - kept.mean()) / kept.std(ddof=1)
    assert np.concatenate([whitened.advantages[node] for node in (1, 2, 3)]) == pytest.approx(
        expected, abs=1e-5
    )


def test_within_a_node_single_tokens_are_masked():
    tree = Tree(group(1).prompt)
    answer = tree.add(
        ROOT, [5] * 3, [-0.01, -2.0, -0.01], group=tree.new_group(), kind=Kind.ANSWER, stop=StopReason.EOS
    )
    critiques = {answer: Critique(10.0, initial_progress=0.0)}
    credit = credit_steps(
        Evidence([tree], [{answer: Grade(1.0)}], critiques=[critiques]), SPOChain(whiten=False)
    )
    assert credit.trees[0].weights[1].tolist() == [0.0, 1.0, 0.0]


def test_a_token_that_was_certain_never_trains():
    """Its probability is not below the mask, but at it."""
    tree = Tree(group(1).prompt)
    answer = tree.add(
        ROOT, [5, 6], [0.0, -1.0], group=tree.new_group(), kind=Kind.ANSWER, stop=StopReason.EOS
    )
    evidence = Evidence([tree], [{answer: Grade(1.0)}], critiques=[{answer: Critique(10.0)}])
    credit = credit_steps(evidence, SPOChain(train_below=1.0, whiten=False))
    assert credit.trees[0].weights[answer].tolist() == [0.0, 1.0]


def test_a_tree_by_hand():
    """Leaves 1, 0 and 1, 1: values 1/2 and 1 above them, 3/4 at the root. Fifteen tokens."""
    tree, leaves = two_by_two()
    grades = dict(zip(leaves, map(Grade, (1.0, 0.0, 1.0, 1.0)), strict=True))
    credit = credit_nodes(Evidence([tree], [grades]), SPOTree(whiten=False))
    weight = pytest.approx(1 / 15)
    assert flat(credit.trees[0]) == {
        1: ([-0.25] * 2, [weight] * 2),
        2: ([0.25] * 3, [weight] * 3),
        3: ([0.5], [weight]),
        4: ([-0.5] * 4, [weight] * 4),
        5: ([0.0], [weight]),
        6: ([0.0] * 4, [weight] * 4),
    }
    assert (credit.groups, credit.groups_with_signal) == (3, 2)
    assert credit.details[0][3] == {"V": 0.5, "value": 1.0, "A": 0.5}


def test_before_whitening_the_advantages_of_a_tree_are_those_of_grft_with_outcomes():
    tree, leaves = two_by_two()
    rng = np.random.default_rng(0)
    grades = {leaf: Grade(float(score)) for leaf, score in zip(leaves, rng.normal(size=4), strict=True)}
    for scale in ("none", "group_std"):
        own = credit_nodes(Evidence([tree], [grades]), SPOTree(scale=scale, whiten=False)).trees[0]
        other = credit_siblings(
            Evidence([tree], [grades]), OUTCOME.model_copy(update={"scale": scale})
        ).trees[0]
        assert {n: a.tolist() for n, a in own.advantages.items()} == {
            n: a.tolist() for n, a in other.advantages.items()
        }


def test_nothing_to_credit():
    tree, leaves = two_by_two()
    failed = dict.fromkeys(leaves, Grade(None, Outcome.CRASHED))
    credit = credit_nodes(Evidence([tree], [failed]), SPOTree())
    assert (credit.groups, flat(credit.trees[0]), credit.denominators) == (0, {}, [0.0])
