"""Comparing mathematical expressions with math-verify, in a process of its own: sympy may take for ever.

math-verify bounds its time by signals, which only a process's main thread gets; a process that does not answer in
time is killed and started anew.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, Literal, get_args

from graft.errors import GraderError
from graft.grading.libraries import import_library

Verdict = Literal["equal", "different", "no answer", "no reference", "timed out"]

TIMEOUT_S = 5.0
"""Longest time for parsing one text, and for comparing the two."""

PATIENCE_S = 10.0
"""How much longer the process may take to answer than three such limits."""

START_S = 120.0
"""Longest time for the process to import its libraries."""


class MathWorker:
    """The process that compares. Safe to use from many threads, which take turns."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        """
        Args:
            timeout_s: longest time for parsing one text, and for comparing the two.

        Raises:
            GraderError: the math-verify library is missing.
        """
        import_library("math_verify", "math")
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def compare(self, text: str, reference: str) -> Verdict:
        """Whether the last expression of a text means the same as the reference.

        Raises:
            GraderError: the process cannot be started.
        """
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([text, reference, self._timeout_s]) + "\n")
                process.stdin.flush()
                answer = self._answers.get(timeout=3 * self._timeout_s + PATIENCE_S)
            except (queue.Empty, OSError):
                answer = ""
            if answer not in get_args(Verdict):  # it hangs, or died of memory
                self._stop()
                return "timed out"
            return answer  # pyright: ignore[reportReturnType]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "graft.grading.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="surrogatepass",
        )
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(process.stdout, answers), daemon=True).start()
        self._process, self._answers = process, answers
        try:
            ready = answers.get(timeout=START_S)
        except queue.Empty:
            ready = ""
        if ready != "ready":
            self._stop()
            raise GraderError(
                f"math: its process ({sys.executable} -m graft.grading.math_worker) does not start; run it to see why"
            )
        return process

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                continue  # what was left to write has nobody to read it


def _listen(output: IO[str] | None, answers: queue.SimpleQueue[str]) -> None:
    """Lines of the process, then an empty one when it has ended."""
    assert output is not None
    try:
        for line in output:
            answers.put(line.rstrip("\n"))
    except ValueError:
        pass  # closed while it was read
    answers.put("")


LAST_LINES = 10
"""Lines that are looked at one by one, from the end."""


def compare(text: str, reference: str, timeout_s: float) -> Verdict:
    """See `MathWorker.compare`; for the main thread of a process."""
    import math_verify

    seconds: Any = max(1, round(timeout_s))
    gold = math_verify.parse(_as_math(reference), parsing_timeout=seconds)
    if not gold:
        return "no reference"
    found = _last_expression(text, lambda piece: math_verify.parse(piece, parsing_timeout=seconds))
    if not found:
        return "no answer"
    return "equal" if math_verify.verify(gold, found, timeout_seconds=seconds) else "different"


def _last_expression(text: str, parse: Callable[[str], list[Any]]) -> list[Any]:
    """What the last line with an expression says; the whole text where formulas span lines or one is boxed.

    On a whole text math-verify prefers what follows "answer", and takes "she answered 12 questions" for it.
    """
    if any(sign in text for sign in ("\\boxed", "\\begin", "\\[", "$$")):
        return parse(text)
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines[: -LAST_LINES - 1 : -1]:
        found = parse(line)
        if found:
            return found
    return parse(text)


def _as_math(reference: str) -> str:
    """A reference that is LaTeX without its dollars gets them."""
    plain = "\\" in reference and "$" not in reference and "\\boxed" not in reference
    return f"${reference}$" if plain else reference


def _main() -> None:
    import math_verify  # noqa: F401  before the parent counts the time

    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        text, reference, timeout_s = json.loads(line)
        print(compare(text, reference, timeout_s), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main()
