from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.cursor import PromptCursor
from graft.errors import CheckpointError, ConfigError

counts = st.integers(1, 40)
seeds = st.integers(0, 2**40)
batches = st.lists(st.integers(0, 30), max_size=12)


@given(count=counts, seed=seeds, epochs=st.integers(1, 4), shuffle=st.booleans())
def test_each_epoch_visits_every_row_once(count: int, seed: int, epochs: int, shuffle: bool) -> None:
    cursor = PromptCursor(count, seed=seed, shuffle=shuffle, epochs=epochs)
    taken = cursor.take(count * epochs + 7)
    assert len(taken) == count * epochs
    for epoch in range(epochs):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert cursor.take(1) == []
    assert cursor.remaining == 0
    assert cursor.epoch == epochs


@given(count=counts, seed=seeds, sizes=batches)
def test_order_does_not_depend_on_batch_sizes(count: int, seed: int, sizes: list[int]) -> None:
    cursor = PromptCursor(count, seed=seed, shuffle=True, epochs=None)
    pieces = [position for size in sizes for position in cursor.take(size)]
    assert pieces == PromptCursor(count, seed=seed, shuffle=True, epochs=None).take(sum(sizes))
    assert cursor.taken == sum(sizes)
    assert cursor.remaining is None


@given(count=counts, seed=seeds, before=batches, after=st.integers(0, 90))
def test_resumes_exactly_through_json(count: int, seed: int, before: list[int], after: int) -> None:
    cursor = PromptCursor(count, seed=seed, shuffle=True, epochs=None)
    for size in before:
        cursor.take(size)
    state = json.loads(json.dumps(cursor.state()))
    resumed = PromptCursor(count, seed=seed, shuffle=True, epochs=None)
    resumed.take(3)  # what it did before restoring does not matter
    resumed.restore(state)
    assert resumed.take(after) == cursor.take(after)


def test_epochs_and_seeds_differ_and_unshuffled_keeps_order() -> None:
    cursor = PromptCursor(50, seed=1, shuffle=True, epochs=None)
    first, second = cursor.take(50), cursor.take(50)
    assert first != second
    assert first != PromptCursor(50, seed=2, shuffle=True, epochs=None).take(50)
    assert first != list(range(50))
    assert PromptCursor(3, seed=1, shuffle=False, epochs=None).take(7) == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_may_change_on_resume_but_rows_and_seed_may_not() -> None:
    cursor = PromptCursor(4, seed=1, shuffle=True, epochs=1)
    cursor.take(4)
    longer = PromptCursor(4, seed=1, shuffle=True, epochs=2)
    longer.restore(cursor.state())
    assert len(longer.take(9)) == 4
    shorter = PromptCursor(4, seed=1, shuffle=True, epochs=1)
    shorter.restore(longer.state())
    assert shorter.take(9) == []
    with pytest.raises(CheckpointError, match="count: 4 in the checkpoint, 5 here"):
        PromptCursor(5, seed=1, shuffle=True, epochs=1).restore(cursor.state())
    with pytest.raises(CheckpointError, match="seed"):
        PromptCursor(4, seed=2, shuffle=True, epochs=1).restore(cursor.state())
    with pytest.raises(CheckpointError, match="taken = None"):
        cursor.restore({"count": 4, "seed": 1, "shuffle": True})


@pytest.mark.parametrize(("count", "seed", "epochs"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_numbers_out_of_range_are_refused(count: int, seed: int, epochs: int) -> None:
    with pytest.raises(ConfigError):
        PromptCursor(count, seed=seed, shuffle=True, epochs=epochs)


def test_negative_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        PromptCursor(3, seed=0, shuffle=True, epochs=1).take(-1)
