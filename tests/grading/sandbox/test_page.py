"""docs/sandbox.md: its example runs, and its tables say what the code and the lock say."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from graft.grading.sandbox import SandboxLimits
from tests.grading.sandbox.sandboxes import open_sandbox

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "sandbox.md").read_text(encoding="utf-8")


def test_the_example(capsys):
    open_sandbox().close()
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(block, {})
    assert capsys.readouterr().out.splitlines() == ["1.0 graded", "0.5"]


def test_the_table_of_limits():
    listed = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert {name: float(value) for name, value in listed} == {
        field.name: field.default for field in fields(SandboxLimits)
    }


def test_the_table_of_packages():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    listed = re.findall(r"\| ([a-z][\w-]+) \| [\d.]+ \| ([\d.]+) \|", PAGE)
    assert len(listed) == 16
    for name, version in listed:
        assert f"\n{name}=={version}\n" in lock
