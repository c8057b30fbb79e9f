"""`graft settings` and the generated reference pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.cli.docs import main, render_pages
from graft.cli.settings import read_sections
from graft.config import RunConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(render_pages()))
def test_the_pages_in_the_repository_are_those_that_are_generated(name):
    assert (DOCS / name).read_text(encoding="utf-8") == render_pages()[name], "run `python -m graft.cli.docs`"


def test_pages_are_written_where_asked(tmp_path, capsys):
    main(tmp_path / "pages")
    written = [path for path in (tmp_path / "pages").rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path / "pages")) for path in written) == sorted(render_pages())
    assert len(capsys.readouterr().out.splitlines()) == len(render_pages())


def test_every_setting_has_a_help_text():
    without = [entry.path for section in read_sections() for entry in section.settings if not entry.help]
    assert without == []


def test_json_names_what_the_tree_holds(graft):
    entries = json.loads(graft("settings", "--json").out)
    listed = {entry["name"]: entry for entry in reversed(entries)}  # of several algorithms the first, grpo
    assert set(RunConfig.model_fields) & set(listed) == {"run", "base", "seed", "grader"}
    assert listed["optimizer.learning_rate"]["default"] == "1e-06"
    assert listed["warm_start.optimizer.learning_rate"]["default"] == "2e-05"  # its own, not the section's
    assert listed["algorithm.group_size"]["type"] == "whole number, at least 2"
    assert listed["model.precision"]["type"] == '"auto", "bf16" or "exact"'
    assert listed["data.source"]["default"] == "none"
    assert listed["model.name"]["default"] == "required"


def test_text_lists_both_algorithms(graft):
    out = graft("settings").out
    assert '[algorithm] name = "grpo"' in out
    assert '[algorithm] name = "sft"' in out
    assert max(map(len, out.splitlines())) <= 110
