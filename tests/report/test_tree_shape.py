"""How the spans of stored trees hang together."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from graft.report.tree_shape import branches, children_of, depths, leaf_paths, path_to, sample_paths
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


def test_what_branches():
    assert branches(GROWN)
    assert not branches(made((0, 0, "t"), (0, 0, "t"), (1, 0, "a"), (2, 0, "a")))
    assert not branches(chains_record(1, [judged_chain(["a\n", "b\n"], "c")] * 3)["nodes"])
    assert branches(grown_record(1, [1, 2])["nodes"])


def test_samples_are_the_paths_that_end_a_completion():
    grown = grown_record(1, [3, 3, 2], shape="chain")["nodes"]
    assert [len(path) for path in leaf_paths(grown)].count(3) == 2
    assert len(leaf_paths(grown)) == 2 + 2 + 2
    assert sample_paths(grown) == [path for path in leaf_paths(grown) if len(path) == 3]
    chains = chains_record(1, [judged_chain(["a\n", "b\n"], "c"), judged_chain(["a\n"], None)])["nodes"]
    assert sample_paths(chains) == leaf_paths(chains)


@given(trees())
def test_paths_and_depths_of_any_tree(nodes):
    paths = leaf_paths(nodes)
    assert sorted({node for path in paths for node in path}) == list(range(1, len(nodes)))
    assert all(depths(nodes)[path[-1]] == len(path) for path in paths)
    assert branches(nodes) == any(len(children) > 1 for children in children_of(nodes)[1:])
