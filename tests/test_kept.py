"""Kept sets against plain Python sets: entries by hand, membership, parts, joins, storage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.errors import DataError
from graft.kept import KeptTokens, bitmap_words, entry_of

VOCABULARY = 70  # three words a bitmap, the last one partly used


def mask_of(ids, vocabulary: int = VOCABULARY) -> np.ndarray:
    mask = np.zeros(vocabulary, dtype=bool)
    mask[list(ids)] = True
    return mask


def kept_of(sets, vocabulary: int = VOCABULARY) -> KeptTokens:
    return KeptTokens.of([entry_of(mask_of(ids, vocabulary)) for ids in sets], vocabulary)


def sets_in(kept: KeptTokens) -> list[set[int]]:
    """Asked token by token."""
    return [
        {token for token in range(kept.vocabulary) if kept.part(i, i + 1).contain(np.array([token]))[0]}
        for i in range(len(kept))
    ]


some_sets = st.lists(st.sets(st.integers(0, VOCABULARY - 1), min_size=1), max_size=5)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ({4}, [4]),
        ({69, 3}, [3, 69]),
        ({0, 33, 69}, [1, 2, 32]),  # as many ids as a bitmap has words: the bitmap
        ({0, 31, 32, 63, 64}, [1 - 2**31, 1 - 2**31, 1]),
        (range(VOCABULARY), []),
        (range(1, VOCABULARY), [-2, -1, 2**6 - 1]),
    ],
)
def test_entries_by_hand(ids, words):
    assert entry_of(mask_of(ids)).tolist() == words
    assert entry_of(mask_of(ids)).dtype == np.int32


def test_an_entry_is_never_longer_than_a_bit_a_token():
    rng = np.random.default_rng(0)
    for share in (0.001, 0.02, 0.04, 0.5, 0.999):
        assert len(entry_of(rng.random(50_000) < share)) <= bitmap_words(50_000) == 1563


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33])
def test_vocabularies_around_one_word(vocabulary):
    for ids in ({0}, {vocabulary - 1}, set(range(vocabulary)), set(range(vocabulary // 2 + 1))):
        assert sets_in(kept_of([ids], vocabulary)) == [ids]


@given(some_sets)
def test_the_sets_come_back(sets):
    kept = kept_of(sets)
    assert len(kept) == len(sets)
    assert sets_in(kept) == sets


@given(some_sets, st.data())
def test_membership_of_one_token_a_place(sets, data):
    tokens = [data.draw(st.integers(0, VOCABULARY + 40)) for _ in sets]
    found = kept_of(sets).contain(np.array(tokens, dtype=np.int32))
    assert found.tolist() == [token in own for token, own in zip(tokens, sets, strict=True)]


@given(some_sets, st.data())
def test_parts_joined_are_the_whole(sets, data):
    kept = kept_of(sets)
    cut = data.draw(st.integers(0, len(sets)))
    assert sets_in(kept.part(cut, len(sets))) == sets[cut:]
    whole = KeptTokens.join([kept.part(0, cut), kept.part(cut, len(sets))])
    assert whole.words.tolist() == kept.words.tolist()
    assert whole.ends.tolist() == kept.ends.tolist()
    padded = KeptTokens.join([KeptTokens.everything(2, VOCABULARY), kept])
    assert sets_in(padded) == [set(range(VOCABULARY))] * 2 + sets


@given(some_sets)
def test_storage_gives_the_same_sets_back(sets):
    kept = kept_of(sets)
    again = KeptTokens.from_json(json.loads(json.dumps(kept.to_json())))
    assert (again.vocabulary, again.ends.tolist()) == (kept.vocabulary, kept.ends.tolist())
    assert again.words.tobytes() == kept.words.tobytes()
    assert again.words.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": [2, 1]}, "must rise"),
        ({"ends": [1, 1]}, "rise to the 2 words"),
        ({"words": [1, 2, 3, 4], "ends": [0, 4]}, "at most 3 each"),
        ({"words": [1, 70]}, "ids must be from 0 to 69"),
        ({"words": [-1, 5]}, "ids must be from 0 to 69"),
    ],
)
def test_records_that_cannot_be_are_refused(change, message):
    record = {"vocabulary": VOCABULARY, "ends": [1, 2], "words": [4, 5]}
    assert sets_in(KeptTokens.from_json(record)) == [{4}, {5}]
    with pytest.raises(DataError, match=message):
        KeptTokens.from_json({**record, **change})


def test_the_sets_cannot_be_changed():
    kept = kept_of([{1}, {2}])
    with pytest.raises(ValueError, match="read-only"):
        kept.words[0] = 7
