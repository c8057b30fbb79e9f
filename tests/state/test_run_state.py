"""Where a run stands, through JSON and back."""

from __future__ import annotations

import json

import pytest

from graft.errors import CheckpointError
from graft.state.run_state import RunState

STATE = RunState(
    steps={"warm_start": 30, "train": 7},
    cursors={"train": {"epoch": 1, "place": 5}},
    measured=["before", "after_warm_start"],
    generated_tokens=12345,
    train_seconds=0.1 + 0.2,
    score=None,
)


def test_a_round_trip():
    assert RunState.from_json(json.loads(json.dumps(STATE.to_json()))) == STATE
    assert RunState.from_json(RunState().to_json()) == RunState()


def test_the_number_counts_the_steps_of_all_stages():
    assert STATE.number == 37
    assert RunState().number == 0


@pytest.mark.parametrize("field", list(RunState.__dataclass_fields__))
def test_a_missing_field_is_named(field):
    record = STATE.to_json()
    del record[field]
    with pytest.raises(CheckpointError, match=f"lacks '{field}'"):
        RunState.from_json(record)


def test_two_states_share_nothing():
    first, second = RunState(), RunState()
    first.steps["train"] = 1
    first.measured.append("before")
    assert second == RunState()
    record = STATE.to_json()
    record["cursors"]["train"]["place"] = 99
    assert STATE.cursors["train"]["place"] == 5
