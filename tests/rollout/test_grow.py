"""Prompts -> trees, with an engine that writes down what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from graft.kept import KeptTokens
from graft.rollout.engine import Continuation
from graft.rollout.grow import grow_groups
from graft.rollout.sampling import SamplingSettings, stream_key
from graft.tree import ROOT, Kind, Tree
from graft.types import Prompt, Purpose, StopReason, Tokens
from tests.engines import PlannedEngine


def planned(index: int, place: int, prefix: Tokens, limit: int) -> Continuation:
    """Continuation j of prefix i is `[100 i + j, 7]`, ended by its second token where j is even."""
    return Continuation(
        np.array([100 * index + place, 7], np.int32),
        np.array([-0.5, -0.25 * place], np.float32),
        StopReason.LENGTH if place % 2 else StopReason.EOS,
        KeptTokens.everything(2, 1000),
    )


def engine() -> PlannedEngine:
    return PlannedEngine(planned)


def prompt(row: int, *tokens: int) -> Prompt:
    return Prompt(row=row, messages=(), item={}, tokens=np.array(tokens, np.int32), question=str(row))


def grow(engine: PlannedEngine, prompts: Sequence[Prompt], **changes) -> list[Tree]:
    asked = {
        "group_size": 3,
        "sampling": SamplingSettings(9),
        "seed": 5,
        "purpose": Purpose.TRAIN,
        "step": 2,
        **changes,
    }
    return grow_groups(engine, prompts, **asked)


def test_one_tree_a_prompt_with_one_group_of_whole_completions():
    prompts = [prompt(8, 1, 2, 3), prompt(4, 9)]
    trees = grow(engine(), prompts)
    assert [tree.prompt for tree in trees] == prompts
    for i, tree in enumerate(trees):
        assert tree.groups() == [0]
        assert tree.siblings(0) == tree.leaves() == [1, 2, 3]
        for j, leaf in enumerate(tree.leaves()):
            node = tree.nodes[leaf]
            assert node.parent == ROOT
            assert node.kind is Kind.COMPLETION
            assert node.tokens.tolist() == [100 * i + j, 7]
            assert node.engine_logprobs.tolist() == [-0.5, -0.25 * j]
            assert node.stop is (StopReason.LENGTH if j % 2 else StopReason.EOS)


@pytest.mark.parametrize("purpose", list(Purpose))
def test_kept_sets_stay_with_samples_that_train(purpose):
    [tree] = grow(engine(), [prompt(0, 1)], purpose=purpose)
    assert [tree.nodes[leaf].kept is not None for leaf in tree.leaves()] == [purpose is Purpose.TRAIN] * 3


def test_the_engine_gets_the_templated_prompts_and_the_distribution():
    asked = engine()
    told: list[int] = []
    sampling = SamplingSettings(5, temperature=0.3)
    grow(asked, [prompt(0, 1, 2), prompt(1, 3)], sampling=sampling, progress=told.append)
    assert asked.prefixes == [[1, 2], [3]]
    assert asked.sampling is sampling
    assert told == [6 * 2]


def test_streams_are_keyed_by_row_and_place():
    asked = engine()
    grow(asked, [prompt(8, 1), prompt(4, 9)], attempts=[6, 6])
    assert asked.keys == [
        [stream_key(5, Purpose.TRAIN, 2, row, 6, place) for place in range(3)] for row in (8, 4)
    ]


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"step": 3}, {"purpose": Purpose.EVALUATION}, {"attempts": [1]}], ids=str
)
def test_anything_else_draws_other_samples(change):
    first, second = engine(), engine()
    grow(first, [prompt(0, 1)])
    grow(second, [prompt(0, 1)], **change)
    assert not set(first.keys[0]) & set(second.keys[0])


def test_a_rows_streams_do_not_depend_on_its_company():
    alone, together = engine(), engine()
    grow(alone, [prompt(4, 9)])
    grow(together, [prompt(8, 1), prompt(4, 9), prompt(2, 2)], group_size=5)
    assert together.keys[1][:3] == alone.keys[0]


def test_the_engine_is_told_whom_to_hand_finished_samples():
    asked, seen = engine(), []
    grow(asked, [prompt(4, 1)], finished=lambda *ended: seen.append(ended))
    assert [ended[:2] for ended in seen] == [(0, 0), (0, 1), (0, 2)]
    assert [ended[2].tokens.tolist() for ended in seen] == [[0, 7], [1, 7], [2, 7]]


def test_no_prompts():
    assert grow(engine(), []) == []
