"""What the page is told of one prompt: spans with their numbers, reasons and grades, cut where they are many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graft.report import page_prompts
from graft.report.numbers import NUMBERS, in_order
from graft.report.page_prompts import pair_data, prompt_data
from graft.report.trees import ShownPair, shown_samples
from graft.types import Critique, Outcome
from tests.report.synthetic import MadeChain, chains_record, grown_record, judged_chain


def test_a_chain_by_hand():
    numbers = [{"S": 10.0, "P": 5.0, "A": 0.12345649}, {"S": 0.0, "P": 5.0, "A": -1.0}, {"R": 10.0, "A": 2.0}]
    critique = Critique(10.0, (10.0, 0.0), (5.0, 5.0), ("", "3 + 4 is 7"))
    chain = MadeChain(["2 + 2 = 4\n", "3 + 4 = 8\n"], "8", 1.0, critique, numbers)
    data = prompt_data(chains_record(1, [chain], row=7, question="What?"))
    first, second, answer = data["nodes"]
    assert first == {
        "parent": -1,
        "group": 0,
        "kind": "thought",
        "text": "2 + 2 = 4\n",
        "tokens": 10,
        "stop": "cut",
        "advantage": pytest.approx(0.1234565),
        "numbers": {"S": 10.0, "P": 5.0, "A": 0.123456},
    }
    assert (second["parent"], second["numbers"]["S"], second["reason"]) == (0, 0.0, "3 + 4 is 7")
    assert (answer["parent"], answer["kind"], answer["numbers"]) == (1, "answer", {"R": 10.0, "A": 2.0})
    assert answer["grade"] == {"score": 1.0, "outcome": "graded", "reason": ""}
    assert answer["critique"] == {"overall": 10.0, "outcome": "graded", "problem": ""}
    assert (data["row"], data["leaves"], data["drawn"], data["spans"]) == (7, [2], 1, 3)
    assert "branches" not in data
    assert "survivors" not in data


def test_a_sample_says_which_part_gave_what():
    record = chains_record(1, [MadeChain([], "12"), MadeChain([], "13")])
    record["grades"]["1"]["parts"] = {"form\x1b": 1.0, "right": 0.12345678, "odd": "NaN"}
    given, none = (node["grade"] for node in prompt_data(record)["nodes"])
    assert given["parts"] == {"form␛": 1.0, "right": 0.123457, "odd": "NaN"}
    assert "parts" not in none
    (sample, _) = shown_samples(record)
    pair = pair_data(ShownPair(1, [], {}, sample, replace(sample, parts={})))
    assert pair["before"]["parts"] == given["parts"]
    assert "parts" not in pair["after"]


def test_only_keys_that_the_prompt_was_made_of_are_left_out():
    messages = [{"role": "system", "content": "Choose."}, {"role": "user", "content": "Which is it, A or B?"}]
    record = chains_record(1, [MadeChain([], "A")])
    record["messages"] = messages
    record["item"] = {
        "question": " Which is it, A or B?\n",
        "messages": messages[1:],
        "turns": messages,
        "reference_answer": "A",
        "hint": "it",
        "options": ["A", "é"],
        "others": [],
        "level": {"of": 1},
        "hard": False,
        "weight": 1.5,
        "none": None,
    }
    assert prompt_data(record)["item"] == {
        "reference_answer": "A",
        "hint": "it",
        "options": '["A", "é"]',
        "others": "[]",
        "level": '{"of": 1}',
        "hard": "false",
        "weight": "1.5",
    }


def test_the_prompt_of_a_row_is_left_out_where_a_suffix_was_added_to_it():
    record = chains_record(1, [MadeChain([], "12")], question="6 + 6 =\nAnswer:")
    record["item"] = {"prompt": "6 + 6 =", "answer": "6"}
    assert prompt_data(record, suffix="\nAnswer:")["item"] == {"answer": "6"}
    assert prompt_data(record)["item"] == record["item"]
    (sample,) = shown_samples(record)
    pair = ShownPair(1, record["messages"], record["item"], sample, sample)
    assert pair_data(pair, suffix="\nAnswer:")["item"] == {"answer": "6"}


def test_a_method_that_tells_no_numbers_leaves_none():
    (node,) = prompt_data(chains_record(1, [MadeChain([], "12")]))["nodes"]
    assert not {"numbers", "reason", "critique", "left_out"} & set(node)
    assert node["advantage"] is None


def test_a_failed_critique_says_why_and_gives_no_numbers():
    failed = Critique(outcome=Outcome.TIMED_OUT, problem="no answer\x1b")
    nodes = prompt_data(chains_record(1, [MadeChain(["a\n"], "b", 1.0, failed)]))["nodes"]
    assert nodes[1]["critique"] == {"overall": None, "outcome": "timed_out", "problem": "no answer␛"}
    assert all("numbers" not in node for node in nodes)


def test_numbers_that_are_not_finite_stay_text():
    record = chains_record(1, [judged_chain([], "12")])
    record["numbers"]["1"] = {"A": "NaN", "R": "Infinity"}  # as the run folder writes them
    (node,) = prompt_data(record)["nodes"]
    assert node["numbers"] == {"A": "NaN", "R": "Infinity"}


def test_the_reasons_of_a_critique_go_along_its_path():
    record = grown_record(1, [2, 2])
    leaf = next(node for node in range(3, 7) if record["nodes"][node]["parent"] == 2)
    record["critiques"] = {str(leaf): {"overall": None, "reasons": ["of the prefix", "of the leaf"]}}
    nodes = prompt_data(record)["nodes"]
    assert [node.get("reason") for node in nodes][:2] == [None, "of the prefix"]
    assert nodes[leaf - 1]["reason"] == "of the leaf"


def test_of_large_trees_whole_levels_next_to_the_prompt_are_kept():
    record = grown_record(1, [4, 12, 12])
    total = 4 + 48 + 576
    data = prompt_data(record)
    assert data["spans"] == total
    assert len(data["nodes"]) == page_prompts.NODES_PER_TREE
    assert sum(node.get("left_out", 0) for node in data["nodes"]) == total - page_prompts.NODES_PER_TREE
    assert sum(node["parent"] == -1 for node in data["nodes"]) == 4
    assert sum(node["kind"] == "thought" for node in data["nodes"]) == 52
    assert all(node["parent"] < place for place, node in enumerate(data["nodes"]))
    assert (len(data["leaves"]), data["drawn"]) == (page_prompts.SAMPLES_PER_PROMPT, 576)
    assert all("grade" in data["nodes"][leaf] for leaf in data["leaves"])


def test_a_tree_of_276_nodes_is_there_whole():
    data = prompt_data(grown_record(1, [4, 4, 4, 3]))
    assert len(data["nodes"]) == data["spans"] == 4 + 16 + 64 + 192
    assert data["branches"]
    assert data["survivors"] == []


def test_candidates_that_were_dropped_are_no_samples():
    data = prompt_data(grown_record(1, [3, 3, 1], shape="chain"))
    assert (data["leaves"], data["drawn"]) == ([6], 1)
    assert data["survivors"][-1] == 6
    assert [data["nodes"][node]["kind"] for node in data["survivors"]] == ["thought", "thought", "answer"]


def test_long_texts_are_cut_along_the_path():
    limit = page_prompts.CHARACTERS_PER_SAMPLE
    data = prompt_data(
        chains_record(1, [judged_chain(["x" * (limit - 3), "y" * 10], "z", reasons=["r" * 999])])
    )
    first, second, answer = data["nodes"]
    assert first["text"] == "x" * (limit - 3)
    assert second["text"] == "yyy… [7 more characters in trees.jsonl]"
    assert answer["text"] == "… [1 more characters in trees.jsonl]"
    assert first["reason"].startswith("r" * page_prompts.CHARACTERS_PER_REASON + "… [599 more")


def test_numbers_come_in_their_order_with_the_advantage_last():
    assert in_order(["A", "own", "value", "S", "Ŝ", "S"]) == ["S", "Ŝ", "value", "own", "A"]
    assert in_order(["own"]) == ["own"]
    assert in_order(list(NUMBERS)[::-1]) == list(NUMBERS)
