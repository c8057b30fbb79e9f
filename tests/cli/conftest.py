"""A small task, and the command line called in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from graft.cli.main import main
from tests.tasks import write_task

COMMAND = (sys.executable, "-c", "from graft.cli.main import main; main()")

TROUBLE = """
import math
import os
import signal
import threading
from pathlib import Path

FIRST_CALL = Path(__file__).with_name("first-call")


def terminates_once(completion, item):
    if not FIRST_CALL.exists():
        FIRST_CALL.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return 1.0


def interrupts_once(completion, item):
    if not FIRST_CALL.exists():
        FIRST_CALL.touch()
        os.kill(os.getpid(), signal.SIGINT)
    return 1.0


def raises(completion, item):
    raise ValueError("no such key: golden")


def returns_nan(completion, item):
    return math.nan


def hangs(completion, item):
    threading.Event().wait()
"""


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def task(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A folder with config.toml, rows.jsonl and grader.py; a run takes well under a second."""
    return write_task(tmp_path, tiny_model_folder, code=TROUBLE)


@pytest.fixture
def graft(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`graft("train", path, "--new")`, in this process."""

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def graft_process() -> Callable[..., Result]:
    """The same in a process of its own."""

    def call(*arguments: object) -> Result:
        command: Sequence[str] = [*COMMAND, *(str(argument) for argument in arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return Result(ended.returncode, ended.stdout, ended.stderr)

    return call
