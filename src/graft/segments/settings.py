"""How completions are cut, as a section of the settings."""

from __future__ import annotations

from pydantic import field_validator

from graft.section import Section
from graft.segments.cutter import Cutter
from graft.segments.rules import parse_rule
from graft.segments.text_stream import Decode


class Segments(Section):
    """How completions are cut into thoughts and an answer."""

    cutter: str = "line"
    """Where a thought ends: `line`, `paragraph`, `sentence`, `tokens:N`, `low_probability:P` (after a token less likely
    than P) or `low_probability:P:N` (after N of them)."""

    think_open: str = "<think>"
    """Begins the thoughts; inside, the answer marker means nothing. Empty: no tag."""

    think_close: str = "</think>"
    """Ends the thoughts; what follows is the answer. Empty: no tag."""

    answer_marker: str = "Answer:"
    """Without tags, the segment in which it stands is the answer, to the end of the completion. Empty: no marker."""

    @field_validator("cutter")
    @classmethod
    def _is_a_cutter(cls, value: str) -> str:
        parse_rule(value)
        return value


def open_cutter(settings: Segments, decode: Decode) -> Cutter:
    """The cutter that the settings describe.

    Args:
        settings: the section.
        decode: token ids -> text. It must keep the tags, which some tokenizers hold for special tokens.
    """
    return Cutter(
        rule=parse_rule(settings.cutter),
        decode=decode,
        think_open=settings.think_open,
        think_close=settings.think_close,
        answer_marker=settings.answer_marker,
    )
