"""What a dry run says of its figures, to scripts and to people."""

import json
from dataclasses import replace

from graft.estimated import Estimate, Item
from tests.test_estimate import FACTS

FOUND = Estimate(
    facts=FACTS,
    items=[Item("start", 1, 5.0), Item("training: update", 10, 16.0)],
    seconds_without_signal=165.0,
    memory_bytes=2_460_000_000,
    tokens_sampled_training=800.4,
    tokens_sampled_measuring=220.0,
    tokens_trained=1_760.0,
    tokens_scored=0.0,
    steps={"warm start": 3, "training": 1_200},
    assumptions=["completions have 10 tokens"],
)


def test_all_of_the_run_is_the_sum_of_its_lines():
    assert FOUND.items[1].seconds == 160.0
    assert FOUND.seconds == 165.0


def test_scripts_get_every_figure():
    said = json.loads(json.dumps(FOUND.to_json()))
    assert (said["rows_train"], said["rows_held_out"], said["rows_shared"]) == (100, 20, 0)
    assert said["steps"] == {"warm start": 3, "training": 1_200}
    assert said["tokens_sampled_training"] == 800
    assert said["seconds"] == said["seconds_without_signal"] == 165.0
    assert said["parts"][1] == {
        "name": "training: update",
        "times": 10,
        "seconds_each": 16.0,
        "seconds": 160.0,
    }
    assert said["peak_memory_gb"] == 2.46
    assert said["assumptions"] == ["completions have 10 tokens"]


def test_people_get_a_page():
    text = FOUND.to_text()
    assert "rows      100 to train on, 20 held out; they share no question\n" in text
    assert "prompts   50 tokens on average, 61 the longest\n" in text
    assert "model     tiny, 1,000,000 weights, all of them trained\n" in text
    assert "steps     warm start 3, training 1,200\n" in text
    assert "tokens    800 to sample for training, 220 for measuring, 1,760 to train on" in text
    assert "to score without gradient" not in text
    assert "time      about 2 min 45 s\n" in text
    assert "memory    about 2.5 GB at most\n" in text
    assert text.endswith("Assumed:\n- completions have 10 tokens")


def test_scored_tokens_are_named_where_there_are_any():
    assert ", 90 to score without gradient\n" in replace(FOUND, tokens_scored=90.0).to_text()


def test_time_is_a_range_where_groups_may_lose_their_signal():
    said = (
        "time      about 2 min 45 s with as many groups of different scores as now; 20 s if there were none\n"
    )
    assert said in replace(FOUND, seconds_without_signal=20.0).to_text()
