from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from graft.data.functions import load_function
from graft.errors import ConfigError


def test_file_and_module_functions(tmp_path: Path) -> None:
    (tmp_path / "grader.py").write_text("def reward(completion, item):\n    return 1.0\n")
    function = load_function("grader.py:reward", tmp_path)
    assert function("x", {}) == 1.0
    assert load_function("grader.py:reward", tmp_path) is function  # ran once
    assert pickle.loads(pickle.dumps(function)) is function
    assert load_function("os.path:join", tmp_path)("a", "b")


def test_same_file_name_in_two_folders_and_changed_files_do_not_meet(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "grader.py").write_text(f"def reward():\n    return {name!r}\n")
    assert load_function("grader.py:reward", tmp_path / "one")() == "one"
    assert load_function("grader.py:reward", tmp_path / "two")() == "two"
    (tmp_path / "one" / "grader.py").write_text("def reward():\n    return 'changed'\n")
    assert load_function("grader.py:reward", tmp_path / "one")() == "changed"


def test_dataclasses_work_in_files(tmp_path: Path) -> None:
    (tmp_path / "grader.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Mark:\n    score: float\n\ndef reward():\n    return Mark(0.5).score\n"
    )
    assert load_function("grader.py:reward", tmp_path)() == 0.5


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("reward", "names no function"),
        ("grader.py:", "names no function"),
        (":reward", "names no function"),
        ("grader.py:a.b", "names no function"),
        ("grader.py:rewrad", "did you mean 'reward'"),
        ("grader.py:zzz", "it has: reward"),
        ("grader.py:LIMIT", "is a int; wants a function"),
        ("gradr.py:reward", r"No such file or directory.*Did you mean 'grader.py'"),
        ("broken.py:reward", "importing it fails: SyntaxError"),
        ("leaves.py:reward", "importing it fails: SystemExit"),
        ("no_such_package.module:reward", "ModuleNotFoundError.*Install it"),
        ("os.path:jion", "did you mean 'join'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, reference: str, message: str) -> None:
    (tmp_path / "grader.py").write_text("LIMIT = 3\n\ndef reward(completion, item):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("def reward(:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ConfigError, match=message):
        load_function(reference, tmp_path)
