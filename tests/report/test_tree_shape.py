"""How the spans of stored trees hang together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.report.tree_shape import branches, children_of, depths, leaf_paths, path_to, surviving_path
from graft.tree import Kind
from tests.report.synthetic import chains_record, grown_record, judged_chain


def made(*spans: tuple[int, int, str]) -> list[dict[str, Any]]:
    """Nodes of a tree from (parent, group, kind) of each span after the prompt."""
    letters = {"t": Kind.THOUGHT, "a": Kind.ANSWER, "c": Kind.COMPLETION}
    root = {"parent": -1, "group": -1, "kind": "prompt"}
    return [root, *({"parent": p, "group": g, "kind": str(letters[k])} for p, g, k in spans)]


GROWN = made(
    (0, 0, "t"), (0, 0, "t"), (0, 0, "a"),  # 1 2 3: 2 was gone on from
    (2, 1, "t"), (2, 1, "t"), (2, 1, "t"),  # 4 5 6: 4 was
    (4, 2, "t"), (4, 2, "a"), (4, 2, "t"),  # 7 8 9: the answer 8 ends the path
)  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Any tree: of each span its parent among those before it, its group and kind."""
    count = draw(st.integers(0, 12))
    return made(
        *(
            (draw(st.integers(0, k)), draw(st.integers(0, 4)), draw(st.sampled_from("tac")))
            for k in range(count)
        )
    )


def test_shape_by_hand():
    assert children_of(GROWN)[2] == [4, 5, 6]
    assert depths(GROWN) == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert path_to(GROWN, 8) == [2, 4, 8]
    assert leaf_paths(GROWN) == [[1], [2, 4, 7], [2, 4, 8], [2, 4, 9], [2, 5], [2, 6], [3]]


@pytest.mark.parametrize(
    ("nodes", "path"),
    [
        (GROWN, [2, 4, 8]),
        ([*GROWN, *made((4, 2, "a"))[1:]], [2, 4]),  # two answers: the tree does not tell which was taken
        (made((0, 0, "t"), (0, 0, "t"), (1, 1, "t"), (1, 1, "t")), [1]),  # cut off before an answer
        (made((0, 0, "t"), (0, 0, "t"), (1, 1, "a"), (2, 2, "a")), []),  # all were gone on from
        (made((0, 0, "t"), (0, 0, "c"), (1, 0, "a")), []),  # a completion cut into a chain keeps its group
        (made((0, 0, "c"), (0, 0, "c")), []),
        (made(), []),
    ],
)
def test_the_path_that_a_tree_was_grown_along(nodes, path):
    assert surviving_path(nodes) == path


def test_what_branches():
    assert branches(GROWN)
    assert not branches(made((0, 0, "t"), (0, 0, "t"), (1, 0, "a"), (2, 0, "a")))
    assert not branches(chains_record(1, [judged_chain(["a\n", "b\n"], "c")] * 3)["nodes"])
    assert branches(grown_record(1, [1, 2])["nodes"])


@given(trees())
def test_paths_and_depths_of_any_tree(nodes):
    paths = leaf_paths(nodes)
    assert sorted({node for path in paths for node in path}) == list(range(1, len(nodes)))
    assert all(depths(nodes)[path[-1]] == len(path) for path in paths)
    assert branches(nodes) == any(len(children) > 1 for children in children_of(nodes)[1:])


@given(trees())
def test_a_surviving_path_is_a_path_along_which_no_sibling_was_gone_on_from(nodes):
    path = surviving_path(nodes)
    if path:
        assert path == path_to(nodes, path[-1])
    for node in path:
        siblings = [other for other in range(1, len(nodes)) if nodes[other]["group"] == nodes[node]["group"]]
        gone_on = [
            n for n in siblings if any(nodes[c]["group"] != nodes[n]["group"] for c in children_of(nodes)[n])
        ]
        assert len(gone_on) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_grown_chains_have_one_and_grown_trees_none(seed):
    record = grown_record(1, [3, 3, 1], shape="chain", seed=seed)
    path = surviving_path(record["nodes"])
    assert [len(children_of(record["nodes"])[node]) for node in path] == [3, 1, 0]
    assert surviving_path(grown_record(1, [3, 3, 1], seed=seed)["nodes"]) == []
