"""Calls that want to reach the next one, or one beside them."""

from __future__ import annotations

import os
import secrets
import subprocess

import pytest

from graft.types import Outcome
from tests.grading.sandbox.sandboxes import grader, open_sandbox


@pytest.fixture(autouse=True)
def _one_warm_parent_for_all(sandbox):
    """What is tested here means something only while the worker is not replaced."""
    assert sandbox.run_grade(grader("return 1"), [({}, {})])[0].value == 1.0
    before = list(sandbox._alive)
    yield
    assert list(sandbox._alive) == before


POISON = """
import builtins, json, math, os, random, re, signal, sys
import numpy
math.sqrt = numpy.sqrt = numpy.mean = lambda *a: 42
numpy.zeros(3)[:] = 1
builtins.len = builtins.float = lambda *a: 42
json.loads = json.dumps = lambda *a, **k: {"value": 42.0}
re._cache.clear(); random.random = lambda: 42
sys.modules["statistics"] = sys.modules["decimal"] = None
sys.path.insert(0, "/tmp")
sys.setrecursionlimit(50)
os.environ["POISON"] = "1"; os.umask(0o777); os.chdir("/usr"); os.nice(5)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout = sys.stderr = None
sys.settrace(lambda *a: 1 / 0); sys.setprofile(lambda *a: None)
sys.meta_path.clear(); sys.path_hooks.clear(); sys.path_importer_cache.clear()
object.__subclasses__()
def grade(sample, item): return 1.0
"""

HEALTHY = """
import json, math, os, random, re, signal, statistics, sys
import decimal
import numpy
def grade(sample, item):
    assert math.sqrt(4) == numpy.sqrt(4) == numpy.mean([2]) == 2
    assert len("abc") == 3 and random.random() < 1
    assert json.loads(json.dumps([1])) == [1]
    assert statistics.mean([1, 3]) == decimal.Decimal(2)
    assert "/tmp" not in sys.path and sys.getrecursionlimit() == 1000
    assert "POISON" not in os.environ and os.getcwd() == "/tmp" and os.nice(0) == item["nice"]
    assert os.umask(0o022) == 0o022
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "grader" in sys.modules and not hasattr(sys.modules["grader"], "POISON")
    print("prints")
    return 0.25
"""


def test_a_poisoned_interpreter_is_not_the_next_ones(sandbox):
    nice = sandbox.run_grade("import os\ndef grade(s, i): return os.nice(0)", [({}, {})])[0].value
    assert sandbox.run_grade(HEALTHY, [({}, {"nice": nice})])[0].value == 0.25
    sandbox.run_grade(POISON, [({}, {})] * 3)
    [after] = sandbox.run_grade(HEALTHY, [({}, {"nice": nice})])
    assert (after.value, after.reason, after.stdout) == (0.25, "", "prints\n")


def test_state_of_a_module_starts_anew_with_each_call(sandbox):
    source = "seen = []\ndef grade(sample, item):\n    seen.append(1)\n    return len(seen)"
    assert [r.value for r in sandbox.run_grade(source, [({}, {})] * 3)] == [1.0, 1.0, 1.0]


def test_files_are_gone(sandbox):
    source = """
import os
def grade(sample, item):
    found = [os.path.join(*p) for p in (("/tmp", n) for n in os.listdir("/tmp"))] + os.listdir("/dev/shm")
    for path in ("/tmp/left", "/dev/shm/left2"):
        open(path, "w").write("x")
    os.makedirs("/tmp/.hidden/deep")
    return len(found)
"""
    assert [r.value for r in sandbox.run_grade(source, [({}, {})] * 3)] == [0.0, 0.0, 0.0]


SCAN = """
import ctypes
def grade(sample, item):
    wanted = bytes.fromhex(item["backwards"])[::-1]
    found = 0
    for line in open("/proc/self/maps").readlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if "rw" in line:
            found += ctypes.string_at(start, end - start).count(wanted)
    return found
"""


def test_the_data_of_another_call_is_in_no_memory(sandbox):
    """The warm parent would hand it on if it had ever read it."""
    secret = "graft" + secrets.token_hex(12)
    backwards = secret.encode()[::-1].hex()
    [without_it] = sandbox.run_grade(SCAN, [({"output_text": "other"}, {"backwards": backwards})])
    [with_it] = sandbox.run_grade(SCAN, [({"output_text": secret}, {"backwards": backwards})])
    [after_it] = sandbox.run_grade(SCAN, [({"output_text": "other"}, {"backwards": backwards})])
    assert without_it.value is not None, without_it
    assert with_it.value is not None, with_it
    assert with_it.value > without_it.value  # so the scan finds what is there; itself it finds every time
    assert after_it.value == without_it.value


@pytest.mark.parametrize(
    "attempt",
    [
        "libc.shmget(4711, 4096, 0o1666)",
        "libc.msgget(4711, 0o1666)",
        "libc.semget(4711, 1, 0o1666)",
        "libc.syscall(248, b'user', b'x', b'data', 4, -4) if x86 else libc.syscall(217, b'user', b'x', b'data', 4, -4)",
        "libc.syscall(250, 0, -4, 1) if x86 else libc.syscall(219, 0, -4, 1)",
        "libc.syscall(294, 0) if x86 else libc.syscall(26, 0)",  # would tell of files that others open
    ],
)
def test_what_outlives_a_process_cannot_be_made(sandbox, attempt):
    source = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nx86 = os.uname().machine == 'x86_64'\n"
        f"def grade(s, i):\n    return ctypes.get_errno() if ({attempt}) < 0 else -1"
    )
    assert sandbox.run_grade(source, [({}, {})])[0].value == 1.0  # EPERM


DAEMON = """
import ctypes, os, signal, socket
def grade(sample, item):
    for _ in range(2):  # twice, and in a session of its own: nobody's child any more
        if os.fork():
            if _:
                os._exit(0)
            break
        os.setsid()
    else:
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        ctypes.CDLL(None).prctl(15, item["mark"].encode(), 0, 0, 0)
        server = socket.socket(socket.AF_UNIX)
        server.bind("\\0squatted")
        while True: pass
    return 1.0
"""


def test_a_daemon_does_not_survive_its_call(sandbox):
    for n in range(3):
        mark = f"daemon{n}-{os.getpid()}"
        result = sandbox.run_grade(DAEMON, [({}, {"mark": mark})])[0]
        assert result.value == 1.0, result
        listed = subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True, check=True).stdout
        assert mark not in listed
    look = """
    import os, socket
    socket.socket(socket.AF_UNIX).bind("\\0squatted")  # free again
    return [p for p in os.listdir("/proc") if p.isdecimal()] == ["1"]
    """
    [after] = sandbox.run_grade(grader(look), [({}, {})])
    assert (after.value, after.reason) == (1.0, "")


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage",
        b"\xff\x00" * 1000,
        b'ready\n{"value": 1.0}',
        b'{"value": 1.0, "nonce": ""}',
        b'{"value": 1.0, "nonce": "00"}\n',
        b"[" * 60_000,
        b"1" * 60_000,
        b"x" * 1_000_000,
    ],
    ids=lambda garbage: f"{garbage[:20]}",
)
@pytest.mark.parametrize("end", ["os._exit(0)", "return 1.0", "raise ValueError"])
def test_garbage_in_every_pipe_is_no_value(sandbox, garbage, end):
    source = f"""
import os
def grade(sample, item):
    for n in range(3, 256):
        for way in (n, f"/proc/self/fd/{{n}}"):
            try: os.write(way if way is n else os.open(way, os.O_WRONLY), {garbage!r})
            except OSError: pass
    {end}
"""
    forged, after = (
        sandbox.run_grade(source, [({}, {})])[0],
        sandbox.run_grade(grader("return 0.5"), [({}, {})])[0],
    )
    assert forged.value is None
    assert forged.outcome is Outcome.CRASHED
    assert "result pipe" in forged.reason
    assert (after.value, after.stdout) == (0.5, "")


def test_a_record_of_another_call_does_not_count(sandbox):
    """Two calls side by side, each writing what the other's record would look like."""
    source = """
import json, os, sys
def grade(sample, item):
    frame = sys._getframe()
    while "nonce" not in frame.f_locals:
        frame = frame.f_back
    nonce = frame.f_locals["nonce"]
    for process in os.listdir("/proc"):
        if process.isdecimal() and process != str(os.getpid()):
            os.write(os.open(f"/proc/{process}/fd/4", os.O_WRONLY), json.dumps({"value": 9, "nonce": nonce}).encode())
    return item["n"]
"""
    with open_sandbox(workers=2) as two:
        results = two.run_grade(source, [({}, {"n": n}) for n in range(10)])
    assert [result.value for result in results] == list(map(float, range(10)))


def test_a_source_decides_what_is_imported_from_a_closed_list_only(sandbox):
    """Else it could have a module of its choice run with the warm parent's rights."""
    source = "import antigravity_, this\nimport numpy as np, os\nfrom idlelib import x\n"
    from graft.grading.sandbox.packages import packages_in

    assert packages_in(source) == {"numpy"}
    [result] = sandbox.run_grade("import this\n" + grader("return 1"), [({}, {})])
    assert "Zen of Python" in result.stdout
    [result] = sandbox.run_grade("import this\n" + grader("return 1"), [({}, {})])
    assert "Zen of Python" in result.stdout  # again: it ran in the call's own process
