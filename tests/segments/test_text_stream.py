"""Characters come with the token that completes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.segments.text_stream import REPLACEMENT, TextStream
from graft.types import Tokens
from tests.segments.vocabulary import LARGER, decode, ids

any_tokens = st.lists(st.one_of(st.sampled_from(LARGER), st.integers(0, 256)), max_size=80)
texts = st.text(st.sampled_from("aé数🙂\n. <>3"), max_size=60)


@given(any_tokens)
def test_pieces_make_the_whole_text(tokens):
    stream = TextStream(decode)
    assert "".join([*(stream.feed([token]) for token in tokens), stream.end()]) == decode(tokens)


@given(texts)
def test_whole_characters_are_never_printed_in_halves(text):
    stream = TextStream(decode)
    printed = [stream.feed([token]) for token in ids(text)]
    assert "".join(printed) == text
    assert REPLACEMENT not in "".join(printed)


@given(any_tokens, st.integers(1, 7))
def test_pieces_of_any_size(tokens, size):
    stream = TextStream(decode)
    chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    assert "".join([*map(stream.feed, chunks), stream.end()]) == decode(tokens)


def test_a_character_comes_with_its_last_byte():
    stream = TextStream(decode)
    assert [stream.feed([token]) for token in ids("a", *(bytes([b]) for b in "🙂".encode()), "b")] == [
        *("a", "", "", "", "🙂", "b")
    ]


def test_half_a_character_at_the_end_is_not_lost():
    stream = TextStream(decode)
    assert stream.feed(ids(b"a", b"\xf0")) == "a"
    assert stream.end() == REPLACEMENT


def test_forks_do_not_disturb_each_other():
    stream = TextStream(decode)
    stream.feed(ids("x" * 40, b"\xc3"))
    left, right = stream.fork(), stream.fork()
    assert left.feed(ids(b"\xa9")) == "é"
    assert right.feed(ids(b"\xa8")) == "è"
    assert stream.feed(ids(b"\xab")) == "ë"


def test_decoders_that_strip_the_first_space():
    """As SentencePiece's do: each token is a word with its space, and the first space of a text is not printed."""

    def words(tokens: Tokens) -> str:
        return "".join(f" {int(token)}" for token in tokens).removeprefix(" ")

    stream = TextStream(words)
    numbers = list(range(100))
    assert "".join(stream.feed([number]) for number in numbers) == words(np.array(numbers, np.int32))


@pytest.mark.parametrize("length", [200])
def test_old_tokens_are_not_decoded_again(length):
    seen: list[int] = []

    def counting(tokens: Tokens) -> str:
        seen.append(len(tokens))
        return decode(tokens)

    stream = TextStream(counting)
    for token in ids("a" * length):
        stream.feed([token])
    assert max(seen) < 30
