"""Thoughts and answer: by hand, and the same while growing as afterwards for whatever tokens come."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.segments.cutter import Cutter, Cutting
from graft.segments.rules import parse_rule
from graft.tree import Kind
from graft.types import StopReason
from tests.segments.vocabulary import EOS, LARGER, decode, ids

RULES = (
    "line",
    "paragraph",
    "sentence",
    "tokens:3",
    "tokens:1",
    "low_probability:0.5",
    "low_probability:0.5:3",
)
NOTHING = np.array([], np.int32)

completions = st.lists(
    st.one_of(st.sampled_from(LARGER), st.sampled_from(ids(*"aé.\n\r <>3:!")), st.integers(0, 256)),
    min_size=1,
    max_size=60,
)


def cutter(rule: str = "line", **spellings: str) -> Cutter:
    return Cutter(parse_rule(rule), decode, **spellings)


def pieces(
    *parts: str | int,
    rule: str = "line",
    stop: StopReason | None = StopReason.EOS,
    prompt: str = "",
    **spellings: str,
) -> list[str]:
    """`T:text` for each thought and `A:text` for the answer."""
    tokens = np.array(ids(*parts), np.int32)
    logprobs = np.zeros(len(tokens), np.float32)
    starts, kinds = cutter(rule, **spellings).cut(np.array(ids(prompt), np.int32), tokens, logprobs, stop)
    edges = pairwise([0, *starts, len(tokens)])
    return [
        f"{'A' if kind is Kind.ANSWER else 'T'}:{decode(tokens[a:b])}"
        for (a, b), kind in zip(edges, kinds, strict=True)
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        # the answer marker, without tags
        (["one\ntwo\nAnswer: 4", EOS], ["T:one\n", "T:two\n", "A:Answer: 4"]),
        (["one\nso two. Answer: 4\nmore\n", EOS], ["T:one\n", "A:so two. Answer: 4\nmore\n"]),
        (["Answer: 4", EOS], ["A:Answer: 4"]),
        (["one\nAnswer: 4\nAnswer: 5\n", EOS], ["T:one\n", "A:Answer: 4\nAnswer: 5\n"]),
        # tags
        (["<think>", "one\ntwo", "</think>", "\n4", EOS], ["T:<think>one\n", "T:two</think>", "A:\n4"]),
        (["<think>", "\n", "one\n", "</think>", "4", EOS], ["T:<think>\none\n", "A:</think>4"]),
        (["<th", "ink>", "one", "</", "think", ">\n\n", "4", EOS], ["T:<think>one</think>\n\n", "A:4"]),
        (
            ["<think>", "Answer: 3\none", "</think>", "4", EOS],
            ["T:<think>Answer: 3\n", "T:one</think>", "A:4"],
        ),
        (["Well\n", "<think>", "one", "</think>", "4"], ["T:Well\n", "T:<think>one</think>", "A:4"]),
        (["one\ntwo", "</think>", "4", EOS], ["T:one\n", "T:two</think>", "A:4"]),  # opened by nobody
        (["<think>", "one\ntwo", EOS], ["T:<think>one\n", "A:two"]),  # never closed
        (["<think>", "</think>", "4", EOS], ["A:<think></think>4"]),  # no thought at all
        (
            ["one", "</think>", "a\n", "<think>", "b", "</think>", "c"],
            ["T:one</think>", "A:a\n<think>b</think>c"],
        ),
        # neither
        (["one\ntwo", EOS], ["T:one\n", "A:two"]),
        (["one\n", EOS], ["T:one\n", "A:"]),
        ([EOS], ["A:"]),
    ],
)
def test_thoughts_and_answer(parts, expected):
    assert pieces(*parts) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["one\ntw"], ["T:one\n", "T:tw"]),
        (["one\n"], ["T:one\n"]),
        (["one\n", "\n"], ["T:one\n", "T:\n"]),
        (["one\nAnswer: 1"], ["T:one\n", "T:Answer: 1"]),  # which may go on: 12, 123
        (["Answer: 1"], ["T:Answer: 1"]),
        (["<think>", "one", "</think>"], ["T:<think>one</think>"]),
        (["<think>", "one", "</think>", "4"], ["T:<think>one</think>", "T:4"]),
    ],
)
def test_cut_off(parts, expected):
    assert pieces(*parts, stop=StopReason.LENGTH) == expected


def test_a_template_that_opened_the_thoughts():
    parts = ["Answer: 3\none\n", "Answer: 4", EOS]
    assert pieces(*parts, prompt="Q\n<think>\n") == ["T:Answer: 3\n", "T:one\n", "A:Answer: 4"]
    assert pieces(*parts, prompt="<think> is a tag") == ["A:Answer: 3\none\nAnswer: 4"]
    assert pieces(*parts, prompt="<think>\n\n</think>\n\n") == ["A:Answer: 3\none\nAnswer: 4"]


def test_other_spellings():
    deck = ["<think>", "one\ntwo", "<think / >", "4", EOS]
    assert pieces(*deck, think_close="<think / >") == ["T:<think>one\n", "T:two<think / >", "A:4"]
    gsm8k = ["one\n", "#### 4", EOS]
    assert pieces(*gsm8k, answer_marker="####") == ["T:one\n", "A:#### 4"]
    assert pieces("<think>", "Answer: 4\nx", EOS, think_open="") == ["A:<think>Answer: 4\nx"]
    assert pieces("a\nAnswer: 4\nx", EOS, answer_marker="") == ["T:a\n", "T:Answer: 4\n", "A:x"]


def test_spellings_across_boundaries():
    assert pieces("ab", "Answer", ":", "d", "e", EOS, rule="tokens:3") == ["T:abAnswer", "A::de"]
    assert pieces("ab", "</", "think", ">\n\n", "e", EOS, rule="tokens:3") == [
        "T:ab</",
        "T:think>\n\n",
        "A:e",
    ]


def test_a_worked_example_is_finished():
    assert pieces("one\ntwo", stop=None) == ["T:one\n", "A:two"]


@given(completions, st.sampled_from(RULES), st.sampled_from([StopReason.EOS, StopReason.LENGTH, None]))
def test_pieces_partition_the_completion(tokens, rule, stop):
    array = np.array(tokens, np.int32)
    logprobs = -np.arange(len(tokens), dtype=np.float32) % 2
    starts, kinds = cutter(rule).cut(NOTHING, array, logprobs, stop)
    assert all(a < b for a, b in pairwise([0, *starts, len(tokens)]))
    assert len(kinds) == len(starts) + 1
    assert set(kinds[:-1]) <= {Kind.THOUGHT}
    assert kinds[-1] is (Kind.THOUGHT if stop is StopReason.LENGTH else Kind.ANSWER)


@given(completions, st.sampled_from(RULES))
def test_grown_is_cut_afterwards(tokens, rule):
    """Grown: every segment by a stream of its own, forked where it begins, and asked again at a place in its midst."""
    logprobs = [-float(place % 3 == 0) for place in range(len(tokens))]
    array, given = np.array(tokens, np.int32), np.array(logprobs, np.float32)
    starts, _ = cutter(rule).cut(NOTHING, array, given, StopReason.EOS)

    grown: list[int] = []
    state = cutter(rule).begin(NOTHING)
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), start=1):
        before = state
        state = before.fork()
        if state.feed(token, logprob):
            grown.append(place)
        assert before.fork().feed(token, logprob) == (grown[-1:] == [place])
    assert [place for place in grown if place < len(tokens)] == starts


@given(completions, st.sampled_from(RULES), st.data())
def test_a_boundary_does_not_depend_on_what_follows(tokens, rule, data):
    length = data.draw(st.integers(1, len(tokens)))
    zeros = np.zeros(len(tokens), np.float32)
    array = np.array(tokens, np.int32)
    whole, _ = cutter(rule).cut(NOTHING, array, zeros, StopReason.EOS)
    part, _ = cutter(rule).cut(NOTHING, array[:length], zeros[:length], StopReason.LENGTH)
    assert part == [place for place in whole if place < length]


@given(st.lists(st.sampled_from(["a", "é", "数", " ", "\n", "3", ".", "🙂"]), max_size=40))
def test_lines_against_splitting_the_text(letters):
    """Byte by byte, a boundary can lie behind every newline: the pieces are the lines, blank ones with the next."""
    text = "".join(letters) + "a"
    expected, pending = [], ""
    for part in text.splitlines(keepends=True):
        pending += part
        if any(letter.isalnum() for letter in pending):
            expected.append(pending)
            pending = ""
    raw = np.array([byte + 1 for byte in text.encode()], np.int32)
    starts, _ = cutter().cut(NOTHING, raw, None, None)
    assert [decode(raw[a:b]) for a, b in pairwise([0, *starts, len(raw)])] == expected


def test_asking_after_the_answer_began_costs_nothing():
    state: Cutting = cutter().begin(NOTHING)
    for token in ids("Answer:"):
        state.feed(token, None)
    assert state.answering
    assert not any(state.feed(token, None) for token in ids("\n\na\n"))
