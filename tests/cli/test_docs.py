"""The page of commands. That the committed pages are the generated ones is checked in `test_settings.py`."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from graft.cli import main
from graft.cli.docs import render_commands
from graft.cli.main import EXIT_CODES, app

PAGE = render_commands()


def leaves(path: str, command) -> list[str]:
    inner = getattr(command, "commands", None)
    return [path] if inner is None else [p for name, c in inner.items() for p in leaves(f"{path} {name}", c)]


def test_every_command_and_exit_code_has_its_place():
    titles = re.findall(r"^## `(graft [a-z ]*[a-z])", PAGE, re.MULTILINE)
    assert titles == leaves("graft", get_command(app))
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in PAGE


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert widths == {3}, block


def test_flags_take_no_value_and_options_name_theirs():
    assert "| `--dry-run` |" in PAGE
    assert "| `--set KEY=VALUE` |" in PAGE
    assert "| `--temperature TEMPERATURE` | Of the sampling distribution. Default: 0.7. |" in PAGE


def test_the_variables_that_graft_reads_are_listed():
    source = Path(main.__file__).parents[1]
    read = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(
            r'environ(?:ment)?\.(?:get|setdefault)\("(\w+)"', path.read_text(encoding="utf-8")
        )
    }
    assert {"GRAFT_CACHE", "GRAFT_KERNELS", "CXX"} <= read <= set(main.ENVIRONMENT)
