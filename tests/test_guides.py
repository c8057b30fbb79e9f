"""The examples of the guides run, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from graft.cli.main import main

GUIDES = Path(__file__).parents[1] / "docs" / "guide"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (GUIDES / page).read_text(), re.DOTALL | re.MULTILINE)


def test_python(tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python.md", "python"):
        exec(block.replace("smollm2-135m-instruct", str(tiny_model_folder)), names)
    out = capsys.readouterr().out
    assert "runs/sums" in out
    assert "pass@4" in out
    assert "Did you mean 'learning_rate'?" in out


def test_your_own_task(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("your-own-task.md", "sh") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "graft"
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0, command
        if command == "graft init task":
            config = tmp_path / "task" / "config.toml"
            config.write_text(
                config.read_text()
                .replace("smollm2-135m-instruct", str(tiny_model_folder))
                .replace("max_new_tokens = 96", "max_new_tokens = 8")
            )
