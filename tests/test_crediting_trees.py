"""Credit of the siblings of trees by hand."""

from __future__ import annotations

from typing import Any

import pytest

from graft.algorithm_settings import GRFT, GRPO, ThoughtRewards
from graft.crediting import Evidence, credit_relative
from graft.crediting_trees import continued_values, credit_siblings, critic_scores, outcome_values
from graft.critics.settings import MonteCarlo
from graft.tree import ROOT, Kind, Tree
from graft.types import Critique, Grade, Outcome, StopReason
from tests.test_algorithms import flat, graded, group
from tests.trees import add_segment

OUTCOME = GRFT(shape="tree", branching=(2, 2), score="outcome", scale="none")


def two_by_two() -> tuple[Tree, list[int]]:
    """Two thoughts, each with two answers: nodes 1, 2 below the prompt, 3, 4 below 1, 5, 6 below 2."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    thoughts = [add_segment(tree, ROOT, 2, top, Kind.THOUGHT), add_segment(tree, ROOT, 3, top, Kind.THOUGHT)]
    leaves = []
    for thought in thoughts:
        below = tree.new_group()
        leaves += [
            add_segment(tree, thought, 1, below, Kind.ANSWER),
            add_segment(tree, thought, 4, below, Kind.ANSWER),
        ]
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
    first, second = (
        add_segment(tree, ROOT, 1, top, Kind.THOUGHT),
        add_segment(tree, ROOT, 1, top, Kind.THOUGHT),
    )
    below = tree.new_group()
    third, answer = (
        add_segment(tree, first, 1, below, Kind.THOUGHT),
        add_segment(tree, first, 1, below, Kind.ANSWER),
    )
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


def thoughts_and_ends() -> tuple[Tree, dict[int, Grade], dict[int, Critique]]:
    """Siblings 1 to 6: two thoughts that go on, S 10 and 2; a right answer, a wrong one; a thought that the limit cut
    off, with S 10; an answer that could not be graded."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    for kind in (Kind.THOUGHT, Kind.THOUGHT, Kind.ANSWER, Kind.ANSWER):
        add_segment(tree, ROOT, 1, top, kind)
    tree.add(ROOT, [5], [-1.0], group=top, kind=Kind.THOUGHT, stop=StopReason.LENGTH)
    add_segment(tree, ROOT, 1, top, Kind.ANSWER)
    grades = {3: Grade(1.0), 4: Grade(0.0), 5: Grade(0.0), 6: Grade(None, Outcome.CRASHED)}
    critiques = {
        1: Critique(None, (10.0,), (0.0,)),
        2: Critique(None, (2.0,), (0.0,)),
        3: Critique(10.0, (), ()),
        4: Critique(0.0, (), ()),
        5: Critique(0.0, (10.0,), (0.0,)),
        6: Critique(10.0, (), ()),
    }
    return tree, grades, critiques


@pytest.mark.parametrize(
    ("compare", "expected"),
    [
        # z-scores 1 and -1; ρ G = 10, 0 and 0, the last of a completion that was cut off, whatever its lines are worth
        ("separately", [1.0, -1.0, 20 / 3, -10 / 3, -10 / 3]),
        ("together", [-1.0, -3.0, 8.0, -2.0, -2.0]),
    ],
)
def test_thoughts_and_ends_are_compared_apart_or_together(compare, expected):
    tree, grades, critiques = thoughts_and_ends()
    settings = GRFT(compare=compare, scale="none", rewards=ThoughtRewards(**CRITIC))
    credit = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings)
    assert [credit.details[0][node]["A"] for node in range(1, 6)] == pytest.approx(expected)
    assert 6 not in credit.details[0]
    assert (credit.groups, credit.groups_with_signal) == (1, 1)


@pytest.mark.parametrize(("compare", "with_signal"), [("separately", 0), ("together", 1)])
def test_thoughts_alike_and_ends_alike(compare, with_signal):
    """Thoughts of score 0 and ends of 10."""
    tree, grades, critiques = thoughts_and_ends()
    critiques |= {2: critiques[1], 4: critiques[3], 5: Critique(10.0, (10.0,), (0.0,))}
    settings = GRFT(compare=compare, rewards=ThoughtRewards(**CRITIC))
    credit = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings)
    assert (credit.groups, credit.groups_with_signal) == (1, with_signal)
    assert bool(flat(credit.trees[0])) == bool(with_signal)


def grown_chain() -> tuple[Tree, dict[int, Grade], dict[int, Critique]]:
    """Two thoughts, a right answer and a thought that the limit cut off (nodes 1 to 4); below the first thought one
    that goes on and a wrong answer (5, 6). Continuations from the end of 1, 2, 5: 3/4, 1/4 and 4/4 are solved."""
    tree = Tree(group(1).prompt)
    top = tree.new_group()
    for kind in (Kind.THOUGHT, Kind.THOUGHT, Kind.ANSWER):
        add_segment(tree, ROOT, 1, top, kind)
    tree.add(ROOT, [5], [-1.0], group=top, kind=Kind.THOUGHT, stop=StopReason.LENGTH)
    below = tree.new_group()
    for kind in (Kind.THOUGHT, Kind.ANSWER):
        add_segment(tree, 1, 1, below, kind)
    critiques = {
        2: Critique(None, (2.0,), (2.5,)),
        3: Critique(10.0, (), ()),
        4: Critique(0.0, (5.0,), (5.0,)),
        5: Critique(None, (10.0, 6.0), (7.5, 10.0)),
        6: Critique(0.0, (10.0,), (7.5,)),
    }
    return tree, {3: Grade(1.0), 4: Grade(0.0), 6: Grade(0.0)}, critiques


def test_outcomes_of_a_chain_are_shares_of_solved_continuations():
    """Thoughts and ends have one unit and are compared together; an end's value is its grade, also of a thought that
    was cut off, whatever its continuations would be."""
    tree, grades, critiques = grown_chain()
    assert continued_values(tree, grades, critiques, scale=10.0) == {
        1: 0.75,
        2: 0.25,
        3: 1.0,
        4: 0.0,
        5: 1.0,
        6: 0.0,
    }
    settings = GRFT(score="outcome", scale="none", critic=MonteCarlo())
    credit = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings)
    found = [(credit.details[0][node]["value"], credit.details[0][node]["A"]) for node in range(1, 7)]
    assert found == [(0.75, 0.25), (0.25, -0.25), (1.0, 0.5), (0.0, -0.5), (1.0, 0.5), (0.0, -0.5)]
    assert (credit.groups, credit.groups_with_signal) == (2, 2)


def test_what_could_not_be_judged_has_no_outcome():
    tree, grades, critiques = grown_chain()
    grades[3] = Grade(None, Outcome.CRASHED)
    critiques[2] = Critique(outcome=Outcome.CRASHED)
    assert set(continued_values(tree, grades, critiques, scale=10.0)) == {1, 4, 5, 6}


def test_mixed_scores_of_a_chain():
    tree, grades, critiques = grown_chain()
    settings = GRFT(
        score="mixed",
        outcome_weight=0.25,
        scale="none",
        critic=MonteCarlo(),
        rewards=ThoughtRewards(**CRITIC),
    )
    credit = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings)
    # S of 10 and 2: z-scores 1 and -1, no progress before them. Outcomes 0.75 and 0.25; of the ends 1 and 0, ρ G 10, 0
    assert [credit.details[0][n]["value"] for n in (1, 2, 3, 4)] == pytest.approx(
        [0.9375, -0.6875, 7.75, 0.0]
    )


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


def test_what_is_reported_of_a_tree_and_its_critic():
    """The first thought has S 10, the second 2. Paths: means 10, 10, 2, 2 and grades 1, 0, 1, 1, whose correlation is
    -4 / √(64 · 3/4)."""
    tree, leaves = two_by_two()
    grades = dict(zip(leaves, map(Grade, (1.0, 0.0, 1.0, 1.0)), strict=True))
    critiques = {
        leaf: Critique(10 * (grades[leaf].score or 0.0), (10.0 if leaf < 5 else 2.0,), (5.0,))
        for leaf in leaves
    }
    settings = GRFT(shape="tree", score="mixed", rewards=ThoughtRewards(**CRITIC))
    credit = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), settings)
    assert credit.facts == pytest.approx(
        {
            "nodes_per_tree": 6.0,
            "segments_per_completion": 2.0,
            "critic_thought_mean": 6.0,
            "critic_progress_mean": 5.0,
            "critic_overall_mean": 7.5,
            "standardised_thought_mean": 0.0,
            "standardised_thought_absolute_mean": 1.0,
            "progress_effect_mean": 0.0,
            "critic_agreement": -1 / 3**0.5,
        }
    )
    assert "critic_overall_mean" not in credit_siblings(Evidence([tree], [grades]), OUTCOME).facts


def test_the_agreement_with_the_grader_is_that_of_paths_that_have_ended():
    """A chain: behind a thought of S 10 a right answer, a wrong one, a thought that goes on, and one of S 0 that the
    limit cut off. Means 10, 10 and 5, grades 1, 0 and 0: (5/3) / √(50/3 · 2/3) = 1/2."""
    tree = Tree(group(1).prompt)
    first = add_segment(tree, ROOT, 1, tree.new_group(), Kind.THOUGHT)
    below = tree.new_group()
    right, wrong, on = (
        add_segment(tree, first, 1, below, kind) for kind in (Kind.ANSWER, Kind.ANSWER, Kind.THOUGHT)
    )
    over = tree.add(first, [5], [-1.0], group=below, kind=Kind.THOUGHT, stop=StopReason.LENGTH)
    critiques = {
        right: Critique(10.0, (10.0,), (5.0,)),
        wrong: Critique(0.0, (10.0,), (5.0,)),
        on: Critique(None, (10.0, 10.0), (5.0, 5.0)),
        over: Critique(0.0, (10.0, 0.0), (5.0, 5.0)),
    }
    grades = {right: Grade(1.0), wrong: Grade(0.0), over: Grade(0.0)}
    facts = credit_siblings(Evidence([tree], [grades], critiques=[critiques]), GRFT()).facts
    assert facts["critic_agreement"] == pytest.approx(0.5)
    assert facts["critic_overall_mean"] == pytest.approx(10 / 3)


def test_nothing_to_compare():
    tree, leaves = two_by_two()
    failed = dict.fromkeys(leaves, Grade(None, Outcome.CRASHED))
    credit = credit_siblings(Evidence([tree], [failed]), OUTCOME)
    assert (credit.groups, flat(credit.trees[0]), credit.denominators) == (0, {}, [0.0])


def test_a_prompt_without_grades_adds_nothing_to_the_denominator():
    tree, leaves = two_by_two()
    grades = dict(zip(leaves, map(Grade, (1.0, 0.0, 1.0, 1.0)), strict=True))
    credit = credit_siblings(Evidence([tree, two_by_two()[0]], [grades, {}]), OUTCOME)
    assert credit.denominators == [1.0, 0.0]


def test_of_a_thought_on_several_paths_the_first_critique_counts():
    tree, leaves = two_by_two()
    thoughts = ((10.0,), (0.0,), (5.0,), (5.0,))
    critiques = {leaf: Critique(0.0, own, (5.0,)) for leaf, own in zip(leaves, thoughts, strict=True)}
    grades = dict.fromkeys(leaves, Grade(0.0))
    scores = critic_scores(tree, grades, critiques, ThoughtRewards(), scale=10.0)
    assert [scores[tree.nodes[leaf].parent][1]["S"] for leaf in (leaves[0], leaves[2])] == [10.0, 5.0]
