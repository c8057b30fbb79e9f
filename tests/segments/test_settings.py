"""The section `[segments]`."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from graft.segments.settings import Segments, open_cutter
from tests.segments.vocabulary import decode


def test_defaults():
    cutter = open_cutter(Segments(), decode)
    assert (cutter.think_open, cutter.think_close, cutter.answer_marker) == ("<think>", "</think>", "Answer:")


@pytest.mark.parametrize("name", ["line", "paragraph", "sentence", "tokens:30", "low_probability:0.9:5"])
def test_cutters(name):
    assert Segments(cutter=name).cutter == name


def test_unknown_cutters_are_refused():
    with pytest.raises(ValidationError, match="'word' names no cutter; want 'line', 'paragraph'"):
        Segments(cutter="word")
