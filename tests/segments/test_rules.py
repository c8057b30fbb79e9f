"""Where each rule cuts texts that were cut by hand: `|` marks the boundaries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graft.errors import DataError
from graft.segments.cutter import Cutter
from graft.segments.rules import parse_rule
from tests.segments.vocabulary import decode, ids


def cut(name: str, *pieces: str, logprobs: list[float] | None = None) -> str:
    """The pieces' text with the boundaries marked; pieces are tokens where the vocabulary has them."""
    cutter = Cutter(parse_rule(name), decode, think_open="", think_close="", answer_marker="")
    cutting = cutter.begin(np.array([], np.int32))
    marked = ""
    for place, piece in enumerate(pieces):
        tokens = ids(piece)
        for token in tokens:
            found = cutting.feed(token, None if logprobs is None else logprobs[place])
            marked += decode([token]) + ("|" if found else "")
    return marked


@pytest.mark.parametrize(
    ("pieces", "marked"),
    [
        (["a", "\n", "b", "\n"], "a\n|b\n|"),
        (["a", "b"], "ab"),
        (["a", "\n", "\n", "b"], "a\n|\nb"),  # a blank line joins the following one
        (["\n", " ", "\n", "a", "\n"], "\n \na\n|"),
        (["a", ".\n\n", "b"], "a.\n\n|b"),
        (["a", "\n3", "b", "\n"], "a\n3|b\n|"),  # a token is not divided
        (["---", "\n", "a", "\n"], "---\na\n|"),
        (["\n3", "b", "\n"], "\n3b\n|"),  # nothing stands before its newline
        (["a", "\r\n", "b"], "a\r\n|b"),
        (["a", "\r", "\n", "b"], "a\r\n|b"),
        (["a", "\r", "b"], "a\rb"),
    ],
)
def test_line(pieces, marked):
    assert cut("line", *pieces) == marked


@pytest.mark.parametrize(
    ("pieces", "marked"),
    [
        (["a", "\n", "b", "\n", "\n", "c"], "a\nb\n\n|c"),
        (["a", "\n", " ", " ", "\n", "b"], "a\n  \n|b"),
        (["a", "\n\n", "\n", "b", "\n"], "a\n\n|\nb\n"),
        (["\n\n", "a", "\n\n"], "\n\na\n\n|"),
        (["a", ".\n\n", "b"], "a.\n\n|b"),
        (["a", "\r\n\r\n", "b"], "a\r\n\r\n|b"),
        (["a", "\r\n", "\r\n", "b"], "a\r\n\r\n|b"),
        (["a", "\n", "\n3", "b"], "a\n\n3|b"),
    ],
)
def test_paragraph(pieces, marked):
    assert cut("paragraph", *pieces) == marked


@pytest.mark.parametrize(
    ("pieces", "marked"),
    [
        (["It", ".", " So"], "It.| So"),
        (["Why", "?", "!", " So"], "Why?|! So"),
        (["3", ".", "5", " + ", "1"], "3.5 + 1"),  # no end between digits
        (["is 35", ".", " ", "T", "hen"], "is 35. |Then"),
        (["is 35", ".", " So", " the"], "is 35. So| the"),  # known only with the next word
        (["Mr", ".", " ", "X"], "Mr. X"),
        (["e", ".", "g", ".", " So", ".", " the"], "e.g. So.| the"),
        (["1", ".", " So", " the"], "1. So the"),  # the number of a list's entry
        (["one", "\n", "two", ".", "\n"], "one\n|two.|\n"),
        (["wait", ".", ".", ".", " So"], "wait.|.. So"),
    ],
)
def test_sentence(pieces, marked):
    assert cut("sentence", *pieces) == marked


def test_tokens():
    assert cut("tokens:2", *"abcde") == "ab|cd|e"
    assert cut("tokens:1", *"a \nb") == "a| \nb|"  # what has no content waits for some


def test_low_probability():
    likely, unlikely = math.log(0.95), math.log(0.85)
    given = [likely, unlikely, likely, unlikely, unlikely]
    assert cut("low_probability:0.9", *"abcde", logprobs=given) == "ab|cd|e|"
    assert cut("low_probability:0.9:2", *"abcde", logprobs=given) == "abcd|e"
    assert cut("low_probability:0.8", *"abcde", logprobs=given) == "abcde"


def test_low_probability_wants_probabilities():
    with pytest.raises(DataError, match=r"low_probability.*not sampled"):
        cut("low_probability:0.9", "a")


@pytest.mark.parametrize(
    "name",
    [
        *("lines", "", "line:2", "tokens", "tokens:0", "tokens:x", "tokens:1:2", "low_probability"),
        *("low_probability:0", "low_probability:1.5", "low_probability:nan", "low_probability:0.5:0"),
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="names no cutter; want 'line'"):
        parse_rule(name)
