"""Code against tests: shares by hand, and code that would rather not be tested."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graft.errors import DataError
from graft.grading.sandbox import AssertionTest, ProgramTest
from graft.types import Outcome
from tests.grading.sandbox.sandboxes import LIMITS, open_sandbox

DOUBLE = "def double(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    print(double(int(input())))\n"
PROGRAMS = [ProgramTest("4\n", "8\n"), ProgramTest("-1", "-2"), ProgramTest("0\n", "0")]
ASSERTIONS = [
    AssertionTest("assert double(3) == 6"),
    AssertionTest("assert double('a') == 'aa'\nassert double([]) == []"),
]


def test_the_share_that_is_passed(sandbox):
    constant = "print(8)\ndouble = lambda x: 6"
    results = sandbox.run_tests(
        [(DOUBLE, PROGRAMS + ASSERTIONS), (constant, PROGRAMS + ASSERTIONS), ("", PROGRAMS[:2])]
    )
    assert [result.value for result in results] == [1.0, 2 / 5, 0.0]
    assert {result.outcome for result in results} == {Outcome.GRADED}
    assert results[0].reason == ""
    assert results[1].reason.splitlines()[:2] == [
        "3 of 5 tests failed",
        "test 2: wrote '8\\n', which is not what is wanted",
    ]
    assert results[1].stdout == "8\n"
    assert sandbox.run_tests([]) == []


@pytest.mark.parametrize(
    ("written", "wanted", "value"),
    [
        ("a  \nb\n\n\n", "a\nb", 1.0),
        ("a\nb", "a\nb\n", 1.0),
        ("a\r\nb", "a\nb", 1.0),
        (" a", "a", 0.0),
        ("a\n\nb", "a\nb", 0.0),
        ("", "", 1.0),
        ("\n", "", 1.0),
        ("A", "a", 0.0),
        ("1.0", "1", 0.0),
    ],
)
def test_what_counts_as_the_same_output(sandbox, written, wanted, value):
    code = f"import sys\nsys.stdout.write({written!r})"
    assert sandbox.run_tests([(code, [ProgramTest("", wanted)])])[0].value == value


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import sys\nprint(sys.stdin.read().upper(), end='')", 1.0),
        ("import sys\nprint(''.join(sys.stdin.readlines()).upper())", 1.0),
        ("import sys\nfor line in sys.stdin: print(line.strip().upper())", 1.0),
        ("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read().upper())", 1.0),
        ("import os\nos.write(1, os.read(0, 100).upper())", 1.0),
        ("print(input().upper() + chr(10) + 'CD')\nquit(0)", 1.0),
        ("print(open(0).read().upper())\nexit()", 1.0),
        ("while True:\n    try: print(input().upper())\n    except EOFError: break", 1.0),
        ("print('AB\\nCD')\nraise SystemExit(0)", 1.0),
        ("import sys\nprint('AB\\nCD')\nprint('note', file=sys.stderr)", 1.0),
        ("print('AB\\nCD')\nraise SystemExit(1)", 0.0),
        ("print('AB\\nCD')\nraise SystemExit('message')", 0.0),
        ("print('AB\\nCD')\n1 / 0", 0.0),
        ("print('AB\\nCD', flush=True)\nimport os\nos._exit(3)", 0.0),
        ("print('AB\\nCD')\nprint('more')", 0.0),
        ("def broken(:\n", 0.0),
    ],
)
def test_ways_to_read_and_to_end(sandbox, code, value):
    [result] = sandbox.run_tests([(code, [ProgramTest("ab\ncd\n", "AB\nCD\n")])])
    assert (result.value, result.outcome) == (value, Outcome.GRADED)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f(): return 2", "AssertionError"),
        ("def g(): return 1", "NameError: name 'f' is not defined"),
        ("def f(: return 1", "SyntaxError"),
        ("import os\nos._exit(0)", "ended its process: exit status 0"),
        ("import os\ndef f(): os._exit(0)", "ended its process: exit status 0"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import sys\ndef f(): sys.exit()", "SystemExit"),
        ("def f(): return f()", "RecursionError"),
        ("import os, signal\ndef f(): os.abort()", "signal"),
        ("f = lambda: bytearray(1 << 40)", "MemoryError"),
        ("def f():\n    while True: print('x' * 1000)", "wrote more than output_kb"),
        ('import os\nos.write(4, b\'{"nonce": ""}\')\nos._exit(0)', "result pipe"),
        ("import os\n[os.write(n, b'x') for n in (1, 2, 4)]\nf = lambda: 1", "result pipe"),
        ("import builtins\nbuiltins.AssertionError = Exception\ndef f(): return 2", "AssertionError"),
    ],
)
def test_code_that_fails_an_assertion_in_whatever_way_scores_nothing(sandbox, code, said):
    """Not one of these may count as "could not be tested": then a policy would learn to do it."""
    [result] = sandbox.run_tests([(code, [AssertionTest("assert f() == 1")])])
    assert (result.value, result.outcome) == (0.0, Outcome.GRADED)
    assert said in result.reason


def test_time_runs_out_for_one_test_alone():
    with open_sandbox(limits=replace(LIMITS, wall_s=1.0), workers=2) as sandbox:
        code = "if input() == 'hang':\n    while True: pass\nprint('ok')"
        [result] = sandbox.run_tests(
            [(code, [ProgramTest("go", "ok"), ProgramTest("hang", "ok"), ProgramTest("go", "ok")])]
        )
    assert (result.value, result.outcome) == (2 / 3, Outcome.GRADED)
    assert result.reason.splitlines() == ["1 of 3 tests failed", "test 2: took longer than wall_s = 1 s"]


def test_the_wanted_output_is_not_in_the_sandbox(sandbox):
    """Code that looks for it everywhere prints what it finds."""
    code = """
import ctypes, os
found = []
for line in open("/proc/self/maps").readlines():
    start, end = (int(x, 16) for x in line.split()[0].split("-"))
    if "rw" in line:
        memory = ctypes.string_at(start, end - start)
        place = memory.find(bytes.fromhex("6772616674") + b"-wanted-")
        if place >= 0:
            found.append(memory[place:place + 20])
print(found)
"""
    [result] = sandbox.run_tests([(code, [ProgramTest("", "graft" + "-wanted-4711")])])
    assert result.value == 0.0
    assert b"4711" not in result.stdout.encode()


def test_tests_do_not_see_each_other(sandbox):
    tests = [AssertionTest("seen.append(1)\nassert len(seen) == 1")] * 3
    assert sandbox.run_tests([("seen = []", tests)])[0].value == 1.0


def test_assertions_are_not_run_as_a_program(sandbox):
    code = "if __name__ == '__main__':\n    input()\nx = 1"
    assert sandbox.run_tests([(code, [AssertionTest("assert x == 1")])])[0].value == 1.0


def test_what_cannot_be_tried_has_no_value(sandbox):
    from graft.grading.sandbox.verdict import grade_result, passed, tests_result
    from graft.grading.sandbox.worker import Ended, WorkerLost

    lost = passed(WorkerLost("it ended"), "n", ASSERTIONS[0], LIMITS)
    assert (lost.value, lost.outcome) == (None, Outcome.SANDBOX_FAILED)
    right = passed(Ended(0, 0.0, None, b'ready\n{"nonce": "n"}', b"", 0.1), "n", ASSERTIONS[0], LIMITS)
    assert right.value == 1.0
    assert tests_result([right, lost]).value is None
    unready = Ended(70, 0.0, None, b"", b"the call could not be run: OSError: mount /tmp", 0.1)
    result = grade_result(unready, "n", LIMITS)
    assert (result.outcome, result.reason) == (Outcome.SANDBOX_FAILED, unready.output.decode())


def test_no_tests_are_refused(sandbox):
    with pytest.raises(DataError, match="call 1: no tests"):
        sandbox.run_tests([(DOUBLE, PROGRAMS), (DOUBLE, [])])
