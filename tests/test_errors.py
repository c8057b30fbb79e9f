"""The tree of errors: as its page says, each kind with an exit code of its own."""

from __future__ import annotations

import re

import pytest

from graft import errors
from graft.errors import DivergenceError, GraftError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GraftError)]


def test_the_drawn_tree_is_the_classes():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert drawn == [kind.__name__ for kind in KINDS if kind is not GraftError]
    assert all(kind.__base__ is GraftError for kind in KINDS if kind is not GraftError)


def test_exit_codes_tell_the_kinds_apart():
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes) > 7
    assert all(0 < code < 126 for code in codes)  # above are the shell's own


@pytest.mark.parametrize("kind", KINDS)
def test_each_says_what_it_is_and_keeps_its_message(kind):
    assert kind.__doc__
    assert str(kind("rows.jsonl:3: no prompt")).startswith("rows.jsonl:3: no prompt")


def test_divergence_says_what_to_try():
    said = str(DivergenceError("training step 4: loss is nan"))
    assert said.startswith("training step 4: loss is nan. ")
    for hint in ("optimizer.learning_rate", "optimizer.max_gradient_norm", "graft resume"):
        assert hint in said
