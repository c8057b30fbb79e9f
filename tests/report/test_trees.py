"""Lines of trees.jsonl hold the tree to the bit, and what is picked to show is what was asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graft.report.metrics import Moment, Stage
from graft.report.trees import (
    ShownPair,
    ShownSample,
    before_and_after,
    evenly,
    shown_samples,
    telling_pairs,
    tree_record,
)
from graft.tree import Kind, Tree
from graft.types import Credit, Grade, Outcome, Prompt
from tests.report.synthetic import decode, make_credit, make_prompt, make_tree


def decode_bytes(tokens: np.ndarray) -> str:
    """One byte a token: a character may span several tokens, as with byte-level tokenizers."""
    return bytes(tokens.tolist()).decode("utf-8", errors="replace")


def byte_tree(text: str, boundaries: list[int]) -> Tree:
    prompt = Prompt(0, [], {}, np.array([65], dtype=np.int32), "A")
    tree = Tree(prompt)
    tokens = list(text.encode())
    tree.add(0, tokens, [-1.0] * len(tokens), group=tree.new_group(), kind=Kind.COMPLETION, stop=None)
    return tree.cut(1, boundaries, [Kind.THOUGHT] * (len(boundaries) + 1))


def test_a_record_by_hand():
    tree = make_tree(make_prompt(3, "2+2=", "4"), ["4", "five"])
    grades = {1: Grade(1.0, parts={"format": 0.5}), 2: Grade(None, Outcome.TIMED_OUT, reason="slow")}
    record = tree_record(12, Stage.TRAIN, tree, grades, decode, make_credit(tree, [1.0, 0.0]))
    assert {
        name: record[name]
        for name in ("step", "stage", "row", "messages", "item", "texts", "grades", "advantages")
    } == {
        "step": 12,
        "stage": "train",
        "row": 3,
        "messages": [{"role": "user", "content": "2+2="}],
        "item": {"answer": "4", "question": "2+2="},
        "texts": {"0": "2+2=", "1": "4", "2": "five"},
        "grades": {
            "1": {"score": 1.0, "outcome": "graded", "parts": {"format": 0.5}, "reason": ""},
            "2": {"score": None, "outcome": "timed_out", "parts": {}, "reason": "slow"},
        },
        "advantages": {"1": 0.5, "2": -0.5},
    }
    assert list(record)[:2] == ["step", "stage"]
    assert json.loads(json.dumps(record)) == record


def test_the_tree_comes_back_to_the_bit():
    prompt = make_prompt(3, "2+2=", "4")
    tree = make_tree(prompt, ["First 4.\nSo 4.", "five"]).cut(1, [9], [Kind.THOUGHT, Kind.ANSWER])
    record = json.loads(json.dumps(tree_record(1, "train", tree, {}, decode)))
    assert Tree.from_json(record, prompt).to_json() == tree.to_json()


def test_an_evaluation_says_its_moment_and_has_no_advantages():
    record = tree_record(0, "evaluation", make_tree(make_prompt(1, "?"), ["a"]), {}, decode, moment="before")
    assert record["moment"] == "before"
    assert record["advantages"] == {}


@pytest.mark.parametrize(("stage", "moment"), [("training", None), ("evaluation", "later")])
def test_an_unknown_stage_or_moment_is_refused(stage, moment):
    with pytest.raises(ValueError, match="is not a valid"):
        tree_record(0, stage, make_tree(make_prompt(1, "?"), ["a"]), {}, decode, moment=moment)


def test_the_advantage_of_a_node_is_the_mean_over_its_tokens_and_absent_when_it_does_not_train():
    tree = make_tree(make_prompt(1, "?"), ["ab", "c"])
    credit = Credit({1: np.array([1.0, 2.0], dtype=np.float32)}, {1: np.ones(2)})
    assert tree_record(1, "train", tree, {}, decode, credit)["advantages"] == {"1": 1.5}


def test_keys_without_json_form_are_left_out():
    prompt = Prompt(
        0,
        [{"role": "user", "content": "?", "cache": object()}],
        {"a": {1, 2}, "b": np.int64(3), "c": (1,)},
        np.array([1], dtype=np.int32),
        "?",
    )
    record = tree_record(1, "train", Tree(prompt), {}, decode)
    assert record["messages"] == [{"role": "user", "content": "?"}]
    assert record["item"] == {"b": 3, "c": [1]}


@pytest.mark.parametrize("boundaries", [[1], [2], [3], [1, 2], [1, 2, 3, 4, 5], [4, 5]])
def test_texts_of_a_path_join_to_the_completion_also_when_a_character_is_cut(boundaries):
    text = "é🌱!"  # two, four and one byte
    tree = byte_tree(text, boundaries)
    record = tree_record(1, "train", tree, {}, decode_bytes)
    (sample,) = shown_samples(record)
    assert sample.text == text
    assert len(sample.segments) == len(boundaries) + 1


def test_a_completion_that_ends_within_a_character_keeps_its_replacement_mark():
    prompt = Prompt(0, [], {}, np.array([65], dtype=np.int32), "A")
    tree = Tree(prompt)
    tree.add(0, [0xC3], [-1.0], group=tree.new_group(), kind=Kind.COMPLETION, stop=None)
    assert tree_record(1, "train", tree, {}, decode_bytes)["texts"]["1"] == "\ufffd"


def test_shown_samples_follow_the_branches_with_their_spans():
    tree = make_tree(make_prompt(1, "?"), ["abcd", "xy"]).cut(
        1, [1, 3], [Kind.THOUGHT, Kind.THOUGHT, Kind.ANSWER]
    )
    credit = Credit({1: np.array([0.5], np.float32), 4: np.array([-1.0], np.float32)}, {})
    record = tree_record(1, "train", tree, {4: Grade(1.0, reason="fine"), 2: Grade(0.0)}, decode, credit)
    first, second = shown_samples(record)
    assert first.segments == [("a", 0.5), ("bc", None), ("d", -1.0)]
    assert (first.text, first.score, first.reason, first.tokens, first.stop) == (
        "abcd",
        1.0,
        "fine",
        4,
        "eos",
    )
    assert second.text == "xy"


def test_a_sample_without_a_grade_says_so():
    (sample,) = shown_samples(tree_record(1, "train", make_tree(make_prompt(1, "?"), ["a"]), {}, decode))
    assert (sample.score, sample.outcome) == (None, "not graded")


def held_out(row: int, moment: Moment, text: str, score: float) -> dict[str, object]:
    tree = make_tree(make_prompt(row, f"question {row}"), [text])
    return tree_record(0, Stage.EVALUATION, tree, {1: Grade(score)}, decode, moment=moment)


def test_pairs_are_rows_measured_at_both_ends():
    records = [
        held_out(2, Moment.BEFORE, "b2", 0.0),
        held_out(1, Moment.BEFORE, "b1", 0.0),
        held_out(3, Moment.BEFORE, "b3", 0.0),
        held_out(1, Moment.AFTER_WARM_START, "w1", 1.0),
        held_out(1, Moment.AFTER, "a1", 1.0),
        held_out(2, Moment.AFTER, "a2", 0.0),
        held_out(4, Moment.AFTER, "a4", 0.0),
        tree_record(1, "train", make_tree(make_prompt(3, "?"), ["t"]), {}, decode),
    ]
    pairs = before_and_after(records)
    assert [(pair.row, pair.question, pair.before.text, pair.after.text) for pair in pairs] == [
        (1, "question 1", "b1", "a1"),
        (2, "question 2", "b2", "a2"),
    ]


def pair(row: int, before: float | None, after: float) -> ShownPair:
    first, last = (ShownSample([("text", None)], score, "graded", "", 4, "eos") for score in (before, after))
    return ShownPair(row, [], {}, first, last)


def test_telling_pairs_take_turns_gained_unsolved_lost_kept():
    pairs = [pair(0, 1, 1), pair(1, 0, 0), pair(2, 0, 1), pair(3, 0, 1), pair(4, None, 1), pair(5, 1, 0)]
    assert [p.row for p in telling_pairs(pairs, 5, threshold=1.0)] == [2, 1, 5, 0, 3]
    assert [p.row for p in telling_pairs(pairs, 99, threshold=1.0)] == [2, 1, 5, 0, 3, 4]
    assert telling_pairs([], 3, threshold=1.0) == []


@pytest.mark.parametrize(
    ("length", "count", "chosen"),
    [(5, 9, [0, 1, 2, 3, 4]), (5, 3, [0, 2, 4]), (500, 2, [0, 499]), (3, 1, [2]), (3, 0, []), (0, 2, [])],
)
def test_evenly(length, count, chosen):
    assert evenly(range(length), count) == chosen
