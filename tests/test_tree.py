"""The token tree: spans partition every path, siblings and depth-first order are what they say, storage is exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError
from graft.kept import KeptTokens
from graft.tree import NO_GROUP, ROOT, Kind, Tree
from graft.types import Prompt, StopReason


def make_prompt(tokens=(7, 8, 9)) -> Prompt:
    return Prompt(
        row=3,
        messages=[{"role": "user", "content": "2 + 2 ="}],
        item={"answer": "4"},
        tokens=np.array(tokens, dtype=np.int32),
        question="2 + 2 =",
    )


@st.composite
def trees(draw) -> Tree:
    tree = Tree(make_prompt(draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))))
    for _ in range(draw(st.integers(0, 4))):
        group = tree.new_group()
        parent = draw(st.integers(0, len(tree) - 1))
        for _ in range(draw(st.integers(1, 3))):
            tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
            logprobs = [draw(st.floats(-50, 0, width=32)) for _ in tokens]
            tree.add(parent, tokens, logprobs, group=group, kind=Kind.THOUGHT, stop=StopReason.CUT)
    return tree


def test_two_samples_by_hand():
    tree = Tree(make_prompt())
    group = tree.new_group()
    first = tree.add(ROOT, [1, 2], [-0.5, -1.0], group=group, kind=Kind.COMPLETION, stop=StopReason.EOS)
    second = tree.add(ROOT, [3], [-2.0], group=group, kind=Kind.COMPLETION, stop=StopReason.LENGTH)
    below = tree.add(first, [4, 5], [-1, -1], group=tree.new_group(), kind=Kind.ANSWER, stop=StopReason.EOS)

    assert tree.leaves() == [second, below]
    assert tree.path(below) == [ROOT, first, below]
    assert tree.completion(below).tolist() == [1, 2, 4, 5]
    assert (tree.start(first), tree.start(below), tree.completion_length(below)) == (3, 5, 4)
    assert tree.siblings(group) == [first, second]
    assert list(tree.depth_first()) == [ROOT, first, below, second]
    assert tree.sampled_tokens == 5
    assert tree.nodes[ROOT].group == NO_GROUP


@given(trees())
def test_depth_first_visits_every_node_once_and_keeps_subtrees_together(tree: Tree):
    order = list(tree.depth_first())
    assert sorted(order) == list(range(len(tree)))

    def descendants(node: int) -> set[int]:
        return {node}.union(*(descendants(child) for child in tree.children(node)))

    for position, node in enumerate(order):
        inside = descendants(node)
        assert set(order[position : position + len(inside)]) == inside


@given(trees())
def test_every_path_is_the_prompt_followed_by_its_completion(tree: Tree):
    for leaf in tree.leaves():
        path = np.concatenate([tree.nodes[i].tokens for i in tree.path(leaf)])
        assert path.tolist() == [*tree.prompt.tokens.tolist(), *tree.completion(leaf).tolist()]
        assert tree.start(leaf) + len(tree.nodes[leaf]) == len(path)


@given(trees())
def test_storage_gives_the_same_tree_back_to_the_bit(tree: Tree):
    again = Tree.from_json(json.loads(json.dumps(tree.to_json())), tree.prompt)
    assert len(again) == len(tree)
    for a, b in zip(tree.nodes, again.nodes, strict=True):
        assert (a.parent, a.group, a.kind, a.stop) == (b.parent, b.group, b.kind, b.stop)
        assert a.tokens.tobytes() == b.tokens.tobytes()
        assert a.engine_logprobs.tobytes() == b.engine_logprobs.tobytes()
        assert b.kept is None


def test_kept_sets_are_stored_and_cut_with_their_span():
    sets = [[1, 2], [2], [0, 3], []]  # the last: all of the vocabulary
    kept = KeptTokens.of([np.array(own, np.int32) for own in sets], 200)
    tree = Tree(make_prompt())
    leaf = tree.add(
        ROOT,
        [1, 2, 3, 4],
        [-0.5] * 4,
        group=tree.new_group(),
        kind=Kind.COMPLETION,
        stop=StopReason.EOS,
        kept=kept,
    )
    again = Tree.from_json(json.loads(json.dumps(tree.to_json())), tree.prompt).nodes[leaf].kept
    assert again is not None
    assert (again.words.tolist(), again.ends.tolist()) == ([1, 2, 2, 0, 3], [2, 3, 5, 5])
    chain = tree.cut(leaf, [1, 3], [Kind.THOUGHT, Kind.THOUGHT, Kind.ANSWER])
    pieces = [chain.nodes[i].kept for i in chain.path(chain.leaves()[0])[1:]]
    assert [(p.words.tolist(), p.ends.tolist()) for p in pieces if p] == [
        ([1, 2], [2]),
        ([2, 0, 3], [1, 3]),
        ([], [0]),
    ]


@pytest.mark.parametrize(
    ("logprobs", "sets", "message"),
    [
        ([-1.0, -1.0], [[5], [6, 7]], "token 8 at place 1 is not among those kept there"),
        ([-1.0, -1.0], [[5]], "kept tokens for 1 places, 2 tokens"),
        (None, [[5], [8]], "0 log-probabilities; want one each"),
    ],
)
def test_kept_sets_that_do_not_fit_their_span_are_refused(logprobs, sets, message):
    tree = Tree(make_prompt())
    group = tree.new_group()
    kept = KeptTokens.of([np.array(own, np.int32) for own in sets], 200)
    with pytest.raises(DataError, match=message):
        tree.add(ROOT, [5, 8], logprobs, group=group, kind=Kind.THOUGHT, stop=None, kept=kept)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_cutting_a_completion_partitions_it_and_keeps_its_group(lengths: list[int]):
    total = sum(lengths)
    tree = Tree(make_prompt())
    group = tree.new_group()
    leaf = tree.add(
        ROOT,
        range(total),
        [-t / 10 for t in range(total)],
        group=group,
        kind=Kind.COMPLETION,
        stop=StopReason.EOS,
    )
    other = tree.add(ROOT, [5], [-1.0], group=group, kind=Kind.COMPLETION, stop=StopReason.EOS)
    boundaries = np.cumsum(lengths)[:-1].tolist()
    kinds = [Kind.THOUGHT] * len(boundaries) + [Kind.ANSWER]

    chain = tree.cut(leaf, boundaries, kinds)

    [end] = [i for i in chain.leaves() if i != other]
    assert chain.completion(end).tolist() == list(range(total))
    assert [len(chain.nodes[i]) for i in chain.path(end)[1:]] == lengths
    assert {chain.nodes[i].group for i in chain.path(end)[1:]} == {group}
    assert chain.siblings(group) == [leaf, other]
    assert chain.nodes[end].stop is StopReason.EOS
    assert len(tree) == 3  # the tree that was cut is untouched


@pytest.mark.parametrize(
    ("parent", "tokens", "logprobs", "group", "message"),
    [
        (5, [1], [-1.0], 0, "parent 5 does not exist"),
        (0, [], [], 0, "at least one token"),
        (0, [1, 2], [-1.0], 0, "1 log-probabilities for 2 tokens"),
        (0, [1], [float("nan")], 0, "finite"),
        (0, [-4], [-1.0], 0, "negative"),
        (0, [1], [-1.0], 3, "group 3 does not exist"),
    ],
)
def test_malformed_nodes_are_refused(parent, tokens, logprobs, group, message):
    tree = Tree(make_prompt())
    tree.new_group()
    with pytest.raises(DataError, match=message):
        tree.add(parent, tokens, logprobs, group=group, kind=Kind.THOUGHT, stop=None)
    assert len(tree) == 1


def test_a_malformed_record_is_refused():
    with pytest.raises(DataError, match="not a tree record"):
        Tree.from_json({"nodes": []}, make_prompt())
    with pytest.raises(DataError, match="not the given prompt"):
        Tree.from_json(Tree(make_prompt([1])).to_json(), make_prompt([2]))


def test_the_tree_cannot_be_changed_through_its_arrays():
    tokens = np.array([1, 2, 3], dtype=np.int32)
    tree = Tree(make_prompt(tokens))
    tokens[0] = 99
    assert tree.nodes[ROOT].tokens[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        tree.nodes[ROOT].tokens[0] = 5
