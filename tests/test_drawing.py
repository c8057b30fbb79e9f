"""How the trees of an algorithm branch, and what its critic is shown. Whole draws are in `test_grown_runs.py`."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from graft.algorithm_settings import GRFT, RFT, SPOTree
from graft.critics.scores import failed
from graft.drawing import criticise, shape_of
from graft.errors import GraderError
from graft.rollout.grow_trees import Shape
from graft.segments.settings import Segments, open_cutter
from graft.thoughts import ThoughtCritic
from graft.tree import ROOT, Kind, Tree
from graft.types import Critic, Critique, Grade, Outcome, StopReason, Tokens
from tests.test_algorithms import group


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (GRFT(group_size=3, max_depth=2), Shape((3, 3), "sample", 1.0, 1, separately=True)),
        (
            GRFT(group_size=2, max_depth=3, survivor="softmax", survivor_temperature=0.5, max_draws=4),
            Shape((2, 2, 2), "softmax", 0.5, 4, separately=True),
        ),
        (
            GRFT(shape="tree", branching=(4, 2), max_draws=2, compare="together"),
            Shape((4, 2), "all", 1.0, 2),
        ),
        (SPOTree(branching=(3, 2)), Shape((3, 2), "all")),
    ],
)
def test_shapes(settings, shape):
    assert shape_of(settings) == shape


def whole() -> tuple[Tree, dict[int, Grade]]:
    """A completion of 5 tokens that was graded."""
    tree = Tree(group(1).prompt)
    leaf = tree.add(
        ROOT, [5] * 5, [-1.0] * 5, group=tree.new_group(), kind=Kind.COMPLETION, stop=StopReason.LENGTH
    )
    return tree, {leaf: Grade(1.0)}


def thought_critic(critic: Critic | None) -> ThoughtCritic:
    def decode(tokens: Tokens) -> str:
        return "x" * len(tokens)

    return ThoughtCritic(open_cutter(Segments(cutter="tokens:2"), decode), critic, decode, (), ExitStack())


def half_marks(chains):
    return [Critique(5.0, (5.0,) * len(c.thoughts), (5.0,) * len(c.thoughts)) for c in chains]


def test_completions_are_cut_and_their_grades_go_to_the_chains():
    tree, grades = whole()
    [chain], [moved], [critiques] = criticise(
        thought_critic(half_marks), RFT(), [tree], [grades], max_failure_rate=0.0
    )
    assert [len(node) for node in chain.nodes[1:]] == [2, 2, 1]
    [leaf] = chain.leaves()
    assert moved == {leaf: Grade(1.0)}
    assert len(critiques[leaf].thoughts) == 3


def test_a_critic_that_fails_too_often_says_on_what():
    tree, grades = whole()

    def fails(chains):
        return [failed(Outcome.CRASHED, "broken") for _ in chains]

    with pytest.raises(GraderError) as raised:
        criticise(thought_critic(fails), RFT(), [tree], [grades], max_failure_rate=0.5)
    assert "failed on 1 of 1 completions" in str(raised.value)
    assert "1 x crashed: broken" in str(raised.value)
    assert f"row {tree.prompt.row}, thoughts" in str(raised.value)


@pytest.mark.parametrize(
    ("critic", "settings"),
    [
        (None, SPOTree()),
        (half_marks, GRFT(shape="tree", score="outcome")),
    ],
)
def test_without_a_critic_trees_stay_as_they_grew(critic, settings):
    tree, grades = whole()
    assert criticise(thought_critic(critic), settings, [tree], [grades], max_failure_rate=0.0) == (
        [tree],
        [grades],
        (),
    )
