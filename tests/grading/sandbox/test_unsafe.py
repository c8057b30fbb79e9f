"""The unsafe mode: the same contract and the same results for honest code; the limits that are left."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.grading.sandbox import AssertionTest, ProgramTest, Sandbox
from graft.types import Outcome
from tests.grading.sandbox.sandboxes import LIMITS, grader


@pytest.fixture(scope="module")
def unsafe() -> Iterator[Sandbox]:
    with Sandbox(workers=2, limits=replace(LIMITS, wall_s=2.0, memory_mb=256), unsafe=True) as opened:
        yield opened


def test_grades(unsafe):
    results = unsafe.run_grade(
        grader("print('hi')\nreturn sample['a'] / item['b']"), [({"a": 1}, {"b": b}) for b in (2, 0)]
    )
    assert [(r.value, r.outcome, r.stdout) for r in results] == [
        (0.5, Outcome.GRADED, "hi\n"),
        (None, Outcome.CRASHED, "hi\n"),
    ]
    assert "ZeroDivisionError" in results[1].reason


def test_code_tests(unsafe):
    [result] = unsafe.run_tests(
        [("print(int(input()) * 2)\nx = 1", [ProgramTest("4", "8"), ProgramTest("4", "9")])]
    )
    assert result.value == 0.5
    [result] = unsafe.run_tests([("x = 1", [AssertionTest("assert x == 1"), AssertionTest("assert x == 2")])])
    assert result.value == 0.5


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("while True: pass", Outcome.TIMED_OUT),
        ("while True: print('x' * 1000)", Outcome.OVER_LIMIT),
        ("import os\nos._exit(0)", Outcome.CRASHED),
        ("import ctypes\nctypes.string_at(0)", Outcome.CRASHED),
        ("return float('nan')", Outcome.NOT_FINITE),
    ],
)
def test_what_goes_wrong_harms_no_other(unsafe, body, outcome):
    assert unsafe.run_grade(grader(body), [({}, {})])[0].outcome is outcome
    assert unsafe.run_grade(grader("return 1"), [({}, {})])[0].value == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the memory of a process by this limit")
def test_memory_of_a_process_on_linux(unsafe):
    assert (
        unsafe.run_grade(grader("return len(bytearray(1 << 30))"), [({}, {})])[0].outcome
        is Outcome.OVER_LIMIT
    )


@pytest.mark.skipif(sys.platform != "linux", reason="there is a system call filter on Linux alone")
def test_the_filter_is_there_on_linux(unsafe):
    result = unsafe.run_grade(grader("import socket\nsocket.socket()"), [({}, {})])[0]
    assert "PermissionError" in result.reason


def test_variables_of_the_environment_stay_outside(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-graft-test-secret")
    with Sandbox(workers=1, limits=LIMITS, unsafe=True) as fresh:
        body = "import os\nprint(dict(os.environ))\nreturn any('sk-graft' in v for v in os.environ.values())"
        [result] = fresh.run_grade(grader(body), [({}, {})])
    assert result.value == 0.0
    assert "PYTHONHASHSEED" in result.stdout


def test_processes_of_the_calls_own_group_are_ended_and_its_folder_is_removed(unsafe):
    body = """
    import os, subprocess
    open("left", "w").close()
    child = subprocess.Popen(["/bin/sh", "-c", "while true; do sleep 1; done"])
    print(os.getcwd(), child.pid)
    return 1
    """
    [result] = unsafe.run_grade(grader(body), [({}, {})])
    folder, process = result.stdout.split()
    assert Path(folder).parent == Path(tempfile.gettempdir())
    assert not Path(folder).exists()
    state = None
    for _ in range(1000):  # the signal was sent; on a busy machine it takes a moment to be obeyed
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", process], capture_output=True, text=True, check=False
        )
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            return
    raise AssertionError(f"process {process} is still there: {state}")


def test_it_does_not_protect(unsafe, tmp_path):
    """So that nobody takes it for more than it is."""
    secret = tmp_path / "secret"
    secret.write_text("4711")
    secret.chmod(0o600)
    assert (
        unsafe.run_grade(grader(f"return int(open({str(secret)!r}).read())"), [({}, {})])[0].value == 4711.0
    )
