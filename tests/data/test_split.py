from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.rows import Row
from graft.data.split import refuse_overlap, split_rows
from graft.errors import DataError


def rows_of(questions: list[str]) -> list[Row]:
    return [
        Row(
            index, ({"role": "user", "content": question},), {}, question, question, f"rows.jsonl:{index + 1}"
        )
        for index, question in enumerate(questions)
    ]


questions = st.lists(st.sampled_from([f"q{number}" for number in range(40)]), min_size=2, max_size=60)


@given(questions=questions, seed=st.integers(), data=st.data())
def test_sides_share_no_question_and_held_out_rows_are_distinct(
    questions: list[str], seed: int, data: st.DataObject
) -> None:
    rows = rows_of(questions)
    held_out = data.draw(st.integers(0, len(set(questions)) - 1))
    train, held = split_rows(rows, held_out, seed=seed)
    assert len(held) == held_out == len({row.key for row in held})
    refuse_overlap(train, held)
    assert {row.key for row in [*train, *held]} == set(questions)
    kept = [row.index for row in train]
    assert kept == sorted(kept)
    # every row that is on neither side repeats a held-out question
    sides = {row.index for row in [*train, *held]}
    assert all(row.key in {h.key for h in held} for row in rows if row.index not in sides)


@given(questions=questions, seed=st.integers(), data=st.data())
def test_the_choice_depends_on_questions_alone(questions: list[str], seed: int, data: st.DataObject) -> None:
    held_out = data.draw(st.integers(0, len(set(questions)) - 1))
    shuffled = data.draw(st.permutations(questions))
    chosen = {row.key for row in split_rows(rows_of(questions), held_out, seed=seed)[1]}
    assert chosen == {row.key for row in split_rows(rows_of(shuffled), held_out, seed=seed)[1]}


@given(seed=st.integers(), added=st.integers(0, 20))
def test_added_rows_move_at_most_as_many_others(seed: int, added: int) -> None:
    old = [f"q{number}" for number in range(40)]
    before = {row.key for row in split_rows(rows_of(old), 10, seed=seed)[1]}
    new = [f"new{number}" for number in range(added)]
    after = {row.key for row in split_rows(rows_of(old + new), 10, seed=seed)[1]}
    assert after & set(old) <= before  # no old training row becomes held out
    assert len(before - after) == len(after & set(new))


def test_seeds_choose_differently() -> None:
    rows = rows_of([f"q{number}" for number in range(100)])
    choices = {tuple(row.index for row in split_rows(rows, 20, seed=seed)[1]) for seed in range(5)}
    assert len(choices) == 5


def test_too_few_questions_are_refused() -> None:
    with pytest.raises(DataError, match=r"cannot hold out 2 of 3 rows: they have 2 distinct"):
        split_rows(rows_of(["a", "a", "b"]), 2, seed=0)
    with pytest.raises(DataError, match="-1"):
        split_rows(rows_of(["a"]), -1, seed=0)


def test_overlap_names_count_and_places() -> None:
    train, held = rows_of(["a", "b", "c", "d", "e"]), rows_of(["x", "b", "c", "d", "e"])
    with pytest.raises(DataError, match="4 questions are in both") as caught:
        refuse_overlap(train, held)
    assert "'b' (rows.jsonl:2 and rows.jsonl:2)" in str(caught.value)
    assert "'e'" not in str(caught.value)  # the first three only
    refuse_overlap(train, rows_of(["x"]))
