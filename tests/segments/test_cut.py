"""Trees: cut into chains, and read as chains."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError
from graft.segments.cut import chain_of, chains_of, cut_tree
from graft.segments.cutter import Cutter
from graft.segments.rules import parse_rule
from graft.segments.settings import Segments, open_cutter
from graft.tree import ROOT, Kind, Tree
from graft.types import Grade, StopReason
from tests.segments.vocabulary import EOS, LARGER, decode, ids, make_tree

CUTTER = open_cutter(Segments(), decode)
ONE = ids("one\ntwo\nAnswer: 3", EOS)
TWO = ids("four", EOS)
THREE = ids("five\nsix", EOS)


def test_completions_become_chains_of_their_group():
    cut = cut_tree(make_tree(ONE, TWO, THREE), CUTTER)
    assert [node.kind for node in cut.nodes[1:]] == [
        *(Kind.THOUGHT, Kind.THOUGHT, Kind.ANSWER),
        Kind.ANSWER,
        *(Kind.THOUGHT, Kind.ANSWER),
    ]
    assert [node.parent for node in cut.nodes] == [-1, 0, 1, 2, 0, 0, 5]
    assert cut.groups() == [0]
    assert cut.siblings(0) == [1, 4, 5]  # one node for each sample: the group of whole completions
    assert {node.group for node in cut.nodes[1:]} == {0}
    cuts, ends = StopReason.CUT, StopReason.EOS
    assert [node.stop for node in cut.nodes[1:]] == [cuts, cuts, ends, ends, cuts, ends]


@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from(LARGER), st.integers(0, 256)), min_size=1, max_size=20), max_size=4
    ),
    st.sampled_from(["line", "tokens:2", "low_probability:0.5"]),
    st.booleans(),
)
def test_nothing_of_a_sample_changes(completions, rule, kept):
    tree = make_tree(*completions, kept=kept)
    cut = cut_tree(tree, Cutter(parse_rule(rule), decode))
    assert len(cut.leaves()) == len(tree.leaves())
    for whole, leaf in zip(tree.leaves(), cut.leaves(), strict=True):
        nodes = [cut.nodes[i] for i in cut.path(leaf)[1:]]
        node = tree.nodes[whole]
        assert cut.completion(leaf).tolist() == node.tokens.tolist()
        assert np.concatenate([n.engine_logprobs for n in nodes]).tolist() == node.engine_logprobs.tolist()
        assert cut.nodes[leaf].stop is node.stop
        sets = [place for n in nodes if n.kept is not None for place in n.kept.words.tolist()]
        assert sets == (node.tokens.tolist() if kept else [])
    chains = chains_of(cut, {}, decode)
    for whole, chain in zip(tree.leaves(), chains.values(), strict=True):
        assert "".join([*chain.thoughts, chain.answer or ""]) == decode(tree.nodes[whole].tokens)
        assert len(chain.spans) == len(chain.thoughts) + (chain.answer is not None)
        assert np.concatenate(chain.spans).tolist() == tree.nodes[whole].tokens.tolist()


def test_worked_examples():
    cut = cut_tree(make_tree(ONE, sampled=False, stop=None), CUTTER)
    assert [len(node) for node in cut.nodes[1:]] == [4, 4, len(ONE) - 8]
    assert not any(node.sampled for node in cut.nodes)
    assert [node.stop for node in cut.nodes[1:]] == [StopReason.CUT, StopReason.CUT, None]


def test_log_probabilities_decide_where_to_cut():
    tree = make_tree(ids("abcd"))  # -1, -2, -3, -4
    cut = cut_tree(tree, Cutter(parse_rule("low_probability:0.06"), decode))  # ln 0.06 = -2.8
    assert [len(node) for node in cut.nodes[1:]] == [3, 1]


def test_only_whole_completions_are_cut():
    once = cut_tree(make_tree(ONE), CUTTER)
    with pytest.raises(DataError, match="a tree is cut once"):
        cut_tree(once, CUTTER)


def test_chains():
    tree = make_tree(ids("<think>", "one\n", b"\xc3", "\n3", "</think>", "4", EOS))
    cut = cut_tree(tree, CUTTER)
    grade = Grade(1.0)
    [(leaf, chain)] = chains_of(cut, {cut.leaves()[0]: grade}, decode).items()
    assert leaf == cut.leaves()[0]
    assert chain.thoughts == ("<think>one\n", "\ufffd\n3</think>")
    assert chain.answer == "4"
    assert [len(span) for span in chain.spans] == [5, 3, 2]
    assert chain.grade is grade
    assert chain.prompt is tree.prompt
    tagless = chain_of(cut, leaf, None, decode, tags=("<think>", "</think>"))
    assert tagless.thoughts == ("one\n", "\ufffd\n3")
    assert tagless.grade is None


def test_a_character_in_two_segments_is_read_with_the_later_one():
    tree = make_tree(ids("ab", b"\xc3", b"\xa9", "c"), stop=StopReason.LENGTH)
    cut = cut_tree(tree, Cutter(parse_rule("tokens:3"), decode))
    [chain] = chains_of(cut, {}, decode).values()
    assert [len(span) for span in chain.spans] == [3, 2]
    assert chain.thoughts == ("ab", "éc")
    assert chain.answer is None


def test_a_chain_that_still_grows():
    cut = cut_tree(make_tree(ONE), CUTTER)
    assert chain_of(cut, ROOT, None, decode).thoughts == ()
    chain = chain_of(cut, 1, None, decode)
    assert (chain.thoughts, chain.answer) == (("one\n",), None)
    with pytest.raises(DataError, match="completion"):
        chain_of(make_tree(ONE), 1, None, decode)


@pytest.mark.parametrize("rule", ["line", "sentence", "paragraph", "tokens:5"])
def test_with_the_embedded_tokenizer(rule, embedded_tokenizer):
    texts = [
        "Tom has 3 + 4 = 7 apples.\n\nThen 7 × 2 = 14.\r\nSo 数 🙂 é.\n\n\nAnswer: 14",
        "<think>\nFirst 12.5 * 2 = 25. Next 3.\n</think>\n\n25",
        "\n\n  \nNo marker here\n",
    ]
    tree: Tree = make_tree(
        *[embedded_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        stop=None,
        sampled=False,
    )

    def decode_ids(tokens: np.ndarray) -> str:
        return embedded_tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)

    cut = cut_tree(tree, Cutter(parse_rule(rule), decode_ids))
    chains = list(chains_of(cut, {}, decode_ids).values())
    for text, chain in zip(texts, chains, strict=True):
        assert "".join([*chain.thoughts, chain.answer or ""]) == text
    if rule == "line":
        assert [[*chain.thoughts, chain.answer] for chain in chains] == [
            ["Tom has 3 + 4 = 7 apples.\n", "\nThen 7 × 2 = 14.\r\n", "So 数 🙂 é.\n\n", "\nAnswer: 14"],
            ["<think>\nFirst 12.5 * 2 = 25. Next 3.\n", "</think>\n\n25"],
            ["\n\n  \nNo marker here\n"],
        ]
