"""Libraries that graders need."""

from __future__ import annotations

import json

import pytest

from graft.errors import GraderError
from graft.grading.libraries import import_library


def test_a_library_that_is_there():
    assert import_library("json", "nothing") is json


def test_one_that_is_missing_says_who_wants_it_and_how_to_get_it():
    with pytest.raises(GraderError) as caught:
        import_library("nonesuch.inner", "judge models")
    said = str(caught.value)
    assert said.startswith("judge models: the library 'nonesuch' cannot be imported")
    assert said.endswith("pip install 'graft-rl[graders]'")


def test_one_that_lacks_what_it_needs_itself_names_that(tmp_path, monkeypatch):
    (tmp_path / "halfway.py").write_text("import nonesuch\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GraderError, match=r"'halfway' cannot be imported \(No module named 'nonesuch'\)"):
        import_library("halfway", "math")
