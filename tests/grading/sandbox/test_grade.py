"""The contract of `grade(sample, item)`: values, errors, what is seen."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from graft.errors import ConfigError, DataError, GraderError
from graft.grading.sandbox import Sandbox, SandboxLimits
from graft.types import Outcome
from tests.grading.sandbox.sandboxes import LIMITS, grader, open_sandbox


def test_sample_and_item_arrive_and_the_number_comes_back(sandbox):
    source = (
        "def grade(sample: dict, item: dict) -> float:\n    return sample['text'].count(item['letter']) / 4\n"
    )
    texts = ["", "a", "banana", "é\u2028\ud800a"]
    results = sandbox.run_grade(source, [({"text": text}, {"letter": "a"}) for text in texts])
    assert [result.value for result in results] == [0.0, 0.25, 0.75, 0.25]
    assert {result.outcome for result in results} == {Outcome.GRADED}
    assert {(result.reason, result.stdout) for result in results} == {("", "")}
    assert all(result.seconds > 0 for result in results)


def test_any_json_arrives_as_it_was(grade):
    item = {"deep": [1, 2.5, None, True, {"k": ["\x00", "ü"]}], "integer": 2**70}
    body = f"assert item.pop('large') == 'x' * 1_000_000\nassert item == {item!r}\nreturn 1"
    result = grade(body, item={**item, "large": "x" * 1_000_000})
    assert (result.value, result.reason) == (1.0, "")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("0.1", 0.1),
        ("-3", -3.0),
        ("True", 1.0),
        ("1e308", 1e308),
        ("5e-324", 5e-324),
        ("__import__('fractions').Fraction(1, 3)", 1 / 3),
        ("__import__('decimal').Decimal('0.5')", 0.5),
        ("__import__('numpy').float32(0.25)", 0.25),
    ],
)
def test_a_number_is_a_value(grade, expression, value):
    assert grade(f"return {expression}").value == value


@pytest.mark.parametrize("expression", ["float('nan')", "float('inf')", "-float('inf')", "1e308 * 10"])
def test_a_number_that_is_not_finite_is_no_value(grade, expression):
    result = grade(f"return {expression}")
    assert (result.value, result.outcome) == (None, Outcome.NOT_FINITE)
    assert "must be finite" in result.reason


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("pass", "NoneType; want a number"),
        ("return '1.0'", "str '1.0'; want a number"),
        ("return b'1'", "want a number"),
        ("return [1.0]", "list; want a number"),
        ("return {'score': 1}", "dict; want a number"),
        ("return 1j", "complex; want a number"),
        ("return 10**400", "int; want a number"),
        ("return 10**1_000_000", "int; want a number"),
        ("class A:\n    def __float__(self): raise KeyError('no')\nreturn A()", "KeyError: 'no'"),
        ("class A:\n    def __float__(self): return 'one'\nreturn A()", "A; want a number"),
        ("class A:\n    def __float__(self): return self.__float__()\nreturn A()", "RecursionError"),
        ("import sys\nclass A:\n    def __float__(self): sys.exit(0)\nreturn A()", "SystemExit"),
        (
            "class M(type):\n    __name__ = property(lambda s: 1 / 0)\nclass A(metaclass=M): pass\nreturn A()",
            "ZeroDiv",
        ),
    ],
)
def test_what_is_no_number_is_no_value(grade, body, said):
    result = grade(body)
    assert (result.value, result.outcome) == (None, Outcome.CRASHED)
    assert said in result.reason


def test_an_exception_shows_its_traceback_from_the_first_line_of_the_source(sandbox):
    source = "def helper(x):\n    return 1 / x\n\ndef grade(sample, item):\n    return helper(item['x'])\n"
    good, bad = sandbox.run_grade(source, [({}, {"x": 2}), ({}, {"x": 0})])
    assert good.value == 0.5
    assert (bad.value, bad.outcome) == (None, Outcome.CRASHED)
    assert bad.reason == (
        "Traceback (most recent call last):\n"
        "  File \"<grader>\", line 5, in grade\n    return helper(item['x'])\n           ^^^^^^^^^^^^^^^^^\n"
        '  File "<grader>", line 2, in helper\n    return 1 / x\n           ~~^~~\n'
        "ZeroDivisionError: division by zero\n"
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "no function `grade(sample, item)`"),
        ("grade = 1.0", "no function `grade(sample, item)`"),
        (
            "def grade(sample):\n    return 1.0",
            "TypeError: grade() takes 1 positional argument but 2 were given",
        ),
        ("def grade(a, b, c):\n    return 1.0", "TypeError: grade() missing 1 required positional argument"),
        ("async def grade(sample, item):\n    return 1.0", "coroutine; want a number"),
        ("def grade(sample, item):\nreturn 1.0", "IndentationError"),
        ("def grade(sample, item):\n    return 1.0\n\x00", "null bytes"),
        ("\ud800", "UnicodeEncodeError"),
        ("import nowhere_to_be_found\ndef grade(a, b): return 1", "No module named 'nowhere_to_be_found'"),
        ("(" * 100_000, ""),
        ("-" * 1_000_000 + "1", ""),
        ("def grade(a, b): return " + "+".join(["1"] * 200_000), ""),
    ],
)
def test_a_source_that_cannot_run_is_no_value(sandbox, source, said):
    [result] = sandbox.run_grade(source, [({}, {})])
    assert result.value is None
    assert result.outcome in {Outcome.CRASHED, Outcome.OVER_LIMIT}
    assert result.reason
    assert said in result.reason


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("def f(): return f()\nreturn f()", "RecursionError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
        ("raise ValueError('x' * 100_000 + 'the end')", "xthe end"),
        ("raise ValueError('\\ud800')", "ValueError: ?"),
        ("import os\nos._exit(0)", "exit status 0"),
        ("import os\nos._exit(5)", "exit status 5"),
        ("import os\nos.abort()", "signal SIG"),
        ("import ctypes\nctypes.string_at(0)", "signal SIGSEGV"),
    ],
)
def test_however_the_call_ends_the_next_one_runs(grade, body, said):
    result = grade(body)
    assert (result.value, result.outcome) == (None, Outcome.CRASHED)
    assert said in result.reason
    assert len(result.reason) < 5000
    result.reason.encode()  # can be written to a file
    assert grade("return 0.5").value == 0.5


def test_recursion_without_an_end():
    with open_sandbox(limits=replace(LIMITS, memory_mb=64)) as small:
        deep = "import sys\nsys.setrecursionlimit(10**9)\n"
        in_python = grader(deep + "def f(n): return f(n + 1)\nreturn f(0)")
        in_c = grader(deep + "def f(x, y): return sorted([1, 2], key=lambda _: f(x, y))\nreturn f(0, 0)")
        for source in (in_python, in_c):
            [result] = small.run_grade(source, [({}, {})])
            assert result.value is None
            assert result.outcome in {Outcome.CRASHED, Outcome.OVER_LIMIT}
            assert small.run_grade(grader("return 0.5"), [({}, {})])[0].value == 0.5


def test_what_is_printed_is_kept(grade):
    result = grade(
        """
        import os, subprocess, sys
        print("one")
        print("two", file=sys.stderr, flush=True)
        os.write(1, b"three \\xff\\n")
        subprocess.run(["/bin/sh", "-c", "echo four"], check=True)
        return 1.0
        """
    )
    assert result.value == 1.0
    assert result.stdout == "one\ntwo\nthree \ufffd\nfour\n"


def test_what_was_printed_before_a_crash_is_kept(grade):
    assert grade("import os\nprint('so far')\nos._exit(1)").stdout == "so far\n"


@pytest.mark.parametrize("stream", ["close()", "detach()", "__class__ = 1", "flush = None"])
def test_a_broken_standard_output_does_not_cost_the_value(grade, stream):
    assert grade(f"import sys\ntry: sys.stdout.{stream}\nexcept Exception: pass\nreturn 0.5").value == 0.5


def test_modules_that_the_runner_uses_may_be_replaced(grade):
    """By an honest grader that is careless; only its own process sees it."""
    assert grade("import os, json\nos.write = json.dumps = None\nreturn 0.5").value == 0.5


def test_classes_that_look_up_their_module_work(sandbox):
    source = (
        "from __future__ import annotations\nimport dataclasses, inspect, pydantic\n"
        "@dataclasses.dataclass\nclass A:\n    x: int = 2\n"
        "class B(pydantic.BaseModel):\n    a: A\n"
        "def grade(sample, item):\n    assert 'def grade' in inspect.getsource(grade)\n"
        "    return B.model_validate({'a': {'x': '3'}}).a.x"
    )
    [result] = sandbox.run_grade(source, [({}, {})])
    assert (result.value, result.reason) == (3.0, "")


def test_random_numbers_differ_from_call_to_call(sandbox):
    """As in a fresh interpreter; the warm one was seeded once."""
    source = "import numpy\nimport random\n" + grader(
        "return numpy.random.rand() if item['n'] else random.random()"
    )
    for n in (0, 1):
        results = sandbox.run_grade(source, [({}, {"n": n})] * 4)
        assert len({result.value for result in results}) == 4


def test_sets_have_the_same_order_in_every_worker():
    source = grader("return sum(i * ord(c) for i, c in enumerate(set('abcdefghijklmnop')))")
    values = set()
    for _ in range(2):
        with open_sandbox() as fresh:
            values |= {result.value for result in fresh.run_grade(source, [({}, {})] * 2)}
    assert len(values) == 1


def test_several_workers_keep_the_order():
    with open_sandbox(workers=3) as several:
        calls = [({}, {"n": n}) for n in range(50)]
        assert [r.value for r in several.run_grade(grader("return item['n']"), calls)] == list(range(50))
        assert several.run_grade(grader("return 1"), []) == []


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes"])
def test_what_json_cannot_hold_is_refused(sandbox, value):
    with pytest.raises(DataError, match="must hold JSON values alone"):
        sandbox.run_grade(grader("return 1"), [({}, {"x": value})])
    assert sandbox.run_grade(grader("return 1"), [({}, {"x": math.nan})])[0].value == 1.0


def test_a_closed_sandbox_says_so():
    closed = open_sandbox()
    closed.close()
    closed.close()
    with pytest.raises(GraderError, match="closed"):
        closed.run_grade(grader("return 1"), [({}, {})])


@pytest.mark.parametrize("limits", [{"wall_s": 0}, {"memory_mb": -1}, {"processes": 0}])
def test_limits_must_be_above_zero(limits):
    with pytest.raises(ConfigError, match=rf"sandbox: {next(iter(limits))} = .*above 0"):
        SandboxLimits(**limits)


def test_no_workers_are_refused():
    with pytest.raises(ConfigError, match="workers = 0; want at least 1"):
        Sandbox(workers=0)


def test_a_worker_that_was_killed_is_replaced(sandbox):
    def kill_workers() -> None:
        for worker in list(sandbox._alive):
            worker.kill()

    assert sandbox.run_grade(grader("return 1"), [({}, {})])[0].value == 1.0
    kill_workers()
    assert sandbox.run_grade(grader("return 2"), [({}, {})])[0].value == 2.0


LEFT_ALONE = """
import os, subprocess, threading
from graft.grading.sandbox import Sandbox

SOURCE = '''
def grade(sample, item):
    import ctypes
    ctypes.CDLL(None).prctl(15, b"MARK", 0, 0, 0)
    while True: pass
'''
sandbox = Sandbox(workers=1)
threading.Thread(target=sandbox.run_grade, args=(SOURCE, [({}, {})])).start()
while "MARK" not in subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True).stdout: pass
os.kill(os.getpid(), 9)
"""


def test_when_graft_is_killed_nothing_stays_behind(tmp_path):
    """A process that has a sandbox with a call running is killed: the call's process ends too."""
    open_sandbox().close()
    mark = f"graft-{os.getpid()}"  # as a process's name, of which the kernel keeps 15 characters
    script = tmp_path / "main.py"
    script.write_text(LEFT_ALONE.replace("MARK", mark))
    done = subprocess.run([sys.executable, str(script)], check=False, timeout=60)
    assert done.returncode == -9
    for _ in range(1000):  # the kernel takes a moment
        listed = subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True, check=True).stdout
        if mark not in listed:
            return
    raise AssertionError("the call's process is still there")
