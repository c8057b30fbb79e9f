"""Code that wants too much. Limits are small here, and the machine may be slow: what is tested is which one strikes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from graft.grading.sandbox import Sandbox, SandboxResult
from graft.types import Outcome
from tests.grading.sandbox.sandboxes import LIMITS, grader, open_sandbox


@pytest.fixture(scope="module")
def hasty() -> Iterator[Sandbox]:
    with open_sandbox(limits=replace(LIMITS, wall_s=0.5)) as opened:
        yield opened


def run(sandbox: Sandbox, body: str) -> SandboxResult:
    """The result; a healthy call must work afterwards, on the same worker."""
    before = list(sandbox._alive)
    result, after = (
        sandbox.run_grade(grader(body), [({}, {})])[0],
        sandbox.run_grade(grader("return 0.5"), [({}, {})])[0],
    )
    assert after.value == 0.5, after
    assert list(sandbox._alive) == before or not before
    return result


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import time\ntime.sleep(1e6)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import threading\nthreading.Event().wait()",
        "return 3 ** (10 ** 9)",  # in C, without a look at signals
        "import re\nreturn bool(re.match(r'(a+)+$', 'a' * 100 + 'b'))",
        "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nsignal.sigwait([signal.SIGUSR1])",
        "input()\nopen('/dev/zero').read",
        "class A:\n    def __float__(self):\n        while True: pass\nreturn A()",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import os\nr, w = os.pipe()\nos.read(r, 1)",
        "import os\nif not os.fork():\n    while True: pass\nos.wait()",
    ],
)
def test_what_does_not_end_is_ended(hasty, body):
    result = run(hasty, body)
    if body.startswith("input()"):  # there is no input to wait for
        assert result.outcome is Outcome.CRASHED
        assert "EOFError" in result.reason
        return
    assert (result.value, result.outcome) == (None, Outcome.TIMED_OUT)
    assert "took longer than wall_s = 0.5 s" in result.reason
    assert result.seconds >= 0.5


def test_what_was_printed_before_the_time_was_up_is_kept(hasty):
    assert run(hasty, "print('so far')\nwhile True: pass").stdout == "so far\n"


def test_processor_time():
    with open_sandbox(limits=replace(LIMITS, cpu_s=1)) as sandbox:
        result = run(sandbox, "while True: pass")
    assert (result.value, result.outcome) == (None, Outcome.TIMED_OUT)
    assert "more processor time than cpu_s = 1 s" in result.reason


def test_memory_of_one_process(sandbox):
    result = run(sandbox, "return len(bytearray(600 << 20))")
    assert (result.value, result.outcome) == (None, Outcome.OVER_LIMIT)
    assert "MemoryError" in result.reason
    assert run(sandbox, "return len(bytearray(300 << 20))").value == float(300 << 20)


def test_memory_in_small_pieces(sandbox):
    result = run(sandbox, "kept = []\nwhile True: kept.append('x' * 100_000 + str(len(kept)))")
    assert (result.value, result.outcome) == (None, Outcome.OVER_LIMIT)


@pytest.mark.parametrize("kind", ["bytearray(100 << 20)", "mmap.mmap(-1, 100 << 20)"])
def test_memory_of_all_processes_together(sandbox, kind):
    """None is over the limit by itself."""
    body = f"""
    import mmap, os
    for _ in range(12):
        if not os.fork():
            memory = {kind}
            for place in range(0, len(memory), 4096):
                memory[place] = 1
            while True: pass
    while True: pass
    """
    result = run(sandbox, body)
    assert (result.value, result.outcome) == (None, Outcome.OVER_LIMIT), result
    assert "used more than memory_mb = 512 MiB" in result.reason


def test_the_packages_of_the_warm_parent_are_not_counted(sandbox):
    source = "import numpy\nimport pandas\n" + grader("return len(bytearray(400 << 20))")
    [result] = sandbox.run_grade(source, [({}, {})])
    assert result.value == float(400 << 20), result


def test_a_fork_bomb_is_stopped_by_the_number_of_processes(sandbox):
    body = """
    import os, sys
    read, write = os.pipe()
    def bomb():
        while True:
            try: os.fork()
            except OSError as error:
                os.write(write, b".")
                os.read(release, 1)
                os._exit(0)
            os.write(alive, b".")
    release, hold = os.pipe()
    counted, alive = os.pipe()
    if not os.fork():
        bomb()
    os.close(write)
    for _ in range(12):  # all that there can be have failed to fork, and wait
        os.read(read, 1)
    return len(os.listdir("/proc/")) and len([p for p in os.listdir("/proc") if p.isdecimal()])
    """
    result = run(sandbox, body)
    assert result.value is not None, result
    assert 12 <= result.value <= LIMITS.processes


def test_a_fork_bomb_that_does_not_rest(hasty):
    result = run(hasty, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert result.value is None
    assert result.outcome is Outcome.TIMED_OUT


def test_threads_count_as_processes(sandbox):
    body = """
    import threading
    stop, started = threading.Event(), 0
    try:
        while started < 1000:
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    return started
    """
    started = run(sandbox, body).value
    assert started is not None
    assert LIMITS.processes - 2 <= started < LIMITS.processes  # bubblewrap's own may count


@pytest.mark.parametrize(
    "body",
    [
        "while True: print('x' * 1000)",
        "import os\nwhile True: os.write(2, b'x' * 65536)",
        "import os\nif not os.fork():\n    while True: os.write(1, b'x' * 1000)\nwhile True: pass",
        "print('x' * (1 << 19))\nreturn 1.0",
    ],
)
def test_output_without_an_end(sandbox, body):
    result = run(sandbox, body)
    assert (result.value, result.outcome) == (None, Outcome.OVER_LIMIT)
    assert "wrote more than output_kb = 256 KiB" in result.reason
    assert len(result.stdout) == (256 << 10) + 1


def test_output_up_to_the_limit(sandbox):
    result = run(sandbox, f"print('x' * {(256 << 10) - 1})\nreturn 1.0")
    assert (result.value, len(result.stdout)) == (1.0, 256 << 10)


def test_files(sandbox):
    body = """
    import errno, os
    def fill(path, size):
        with open(path, "wb", 0) as file:
            try:
                while True: size -= file.write(bytes(1 << 20))
            except OSError as error:
                return errno.errorcode[error.errno]
    print(fill("/tmp/large", 0), fill("/dev/shm/other", 0))
    print(sum(os.path.getsize("/tmp/" + n) for n in os.listdir("/tmp")))
    return 1.0
    """
    words = run(sandbox, body).stdout.split()
    assert words[0] in ("EFBIG", "ENOSPC")
    assert words[1] == "ENOSPC"
    assert int(words[2]) == 64 << 20


def test_number_of_files(sandbox):
    result = run(sandbox, "for n in range(100_000): open(f'/tmp/{n}', 'w').close()")
    assert "No space left on device" in result.reason


def test_open_files(sandbox):
    result = run(sandbox, "files = [open('/dev/null') for _ in range(1000)]")
    assert "Too many open files" in result.reason
