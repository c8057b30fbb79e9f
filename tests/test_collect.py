"""Dynamic sampling by hand: what is kept, in which order, what is drawn for nothing and comes again."""

from __future__ import annotations

from collections.abc import Sequence

from graft.collect import Collected, Drawn, collect, has_signal
from graft.data.cursor import PromptCursor
from graft.types import Grade, Outcome
from tests.test_algorithms import graded, group


class Rows:
    """Rows in order; some have signal."""

    def __init__(self, useful: set[int], *, count: int = 100, epochs: int | None = 1) -> None:
        self.useful = useful
        self.cursor = PromptCursor(count, seed=0, shuffle=False, epochs=epochs)
        self.rounds: list[list[int]] = []
        self.attempts: list[list[int]] = []

    def draw(self, places: Sequence[int], attempts: Sequence[int]) -> Drawn:
        assert len(attempts) == len(places)
        self.attempts.append(list(attempts))
        self.rounds.append(list(places))
        drawn = Drawn()
        for place in places:
            tree = group(1, 1, row=place)
            drawn.add(place, tree.prompt, tree, graded(1.0, 0.0 if place in self.useful else 1.0))
        return drawn

    def collect(self, wanted: int, max_rounds: int) -> Collected:
        return collect(
            self.cursor.take, self.cursor.put_back, self.draw, wanted=wanted, max_rounds=max_rounds
        )


def test_one_round_keeps_everything():
    rows = Rows({1})
    result = rows.collect(3, 1)
    assert (result.kept.places, result.discarded.places, result.rounds) == ([0, 1, 2], [], 1)


def test_until_the_batch_is_full():
    # round 1: 0..3, half useful; 2 are missing, so 4 more: 4..7 with 5, 6, 7 useful: one too many comes again
    rows = Rows({1, 2, 5, 6, 7, 9})
    result = rows.collect(4, 5)
    assert rows.rounds == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert result.kept.places == [1, 2, 5, 6]
    assert sorted(result.discarded.places) == [0, 3, 4, 7]
    assert result.discarded.sampled_tokens == 8
    assert result.rounds == 2
    rows.rounds.clear()
    assert rows.collect(1, 1).kept.places == [7]
    assert rows.cursor.take(1) == [8]


def test_what_comes_again_is_in_the_cursors_state():
    rows = Rows({1, 2, 5, 6, 7})
    rows.collect(4, 5)
    again = PromptCursor(100, seed=0, shuffle=False, epochs=1)
    again.restore(rows.cursor.state())
    assert again.taken == rows.cursor.taken == 7
    assert again.remaining == 93
    assert again.take(3) == rows.cursor.take(3) == [7, 8, 9]


def test_the_rounds_end_and_training_goes_on_with_what_there_is():
    rows = Rows({1})
    result = rows.collect(2, 2)
    assert result.kept.places == [1]
    assert result.rounds == 2
    assert len(rows.rounds[1]) == 2  # one is missing, and every second had signal


def test_a_later_round_is_not_larger_than_eight_times_what_is_missing():
    rows = Rows({50})
    rows.collect(2, 2)
    assert [len(places) for places in rows.rounds] == [2, 16]


def test_without_any_signal_the_first_round_is_kept():
    rows = Rows(set())
    result = rows.collect(2, 2)
    assert result.kept.places == [0, 1]
    assert result.discarded.places == list(range(2, 18))


def test_the_data_ends():
    rows = Rows({1}, count=3)
    assert rows.collect(3, 4).kept.places == [1]
    assert rows.collect(3, 4).kept.places == []
    assert rows.collect(3, 1).kept.places == []


def test_signal_is_in_the_grades_that_there_are():
    failed = Grade(None, Outcome.CRASHED)
    assert has_signal(graded(0.1, 0.2))
    assert not has_signal(graded(0.1, 0.1))
    assert not has_signal({1: Grade(1.0), 2: failed})
    assert not has_signal({1: failed})


def test_a_row_that_comes_again_is_another_attempt():
    rows = Rows(set(), count=3, epochs=None)
    rows.collect(2, 2)  # 2, then 8 times what is missing: 18 of 3 rows
    assert rows.rounds[0] == [0, 1]
    assert rows.attempts[0] == [0, 0]
    assert rows.rounds[1] == [2, 0, 1] * 5 + [2]
    assert rows.attempts[1][:7] == [0, 1, 1, 1, 2, 2, 2]
    rows.collect(4, 1)
    assert rows.rounds[2] == [0, 1, 2, 0]
    assert rows.attempts[2] == [0, 0, 0, 1]
