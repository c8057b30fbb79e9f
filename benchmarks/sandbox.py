"""Calls a second of the sandbox: `python -m benchmarks.sandbox --json`.

The python sandbox's warm pool against what it replaces, in turns in one run, on the same calls: a fresh sandbox for
each call, and a fresh interpreter for each call without any sandbox.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import cell, ratio, say, spread
from graft.grading.sandbox import Sandbox

SOURCES = {
    "plain": """
import re
def grade(sample, item):
    numbers = re.findall(r"-?\\d+", sample["output_text"])
    return float(bool(numbers) and numbers[-1] == item["answer"])
""",
    "numpy": """
import numpy as np
def grade(sample, item):
    numbers = np.array(sample["output_text"].split()[-1:], dtype=float)
    return float(np.exp(-np.abs(numbers - float(item["answer"])).sum()))
""",
}
"""Two graders: one of the standard library alone, one that imports numpy."""

FRESH = """
import json, sys
call = json.load(sys.stdin)
namespace = {}
exec(call["source"], namespace)
print(float(namespace["grade"](call["sample"], call["item"])))
"""
"""What a fresh interpreter runs."""

TARGETS = {"warm pool: plain": ">= 200 on 2 cores"}

Turn = Callable[[int], list[float]]
"""Grades so many calls, and returns the values."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    report: dict[str, Any] = {
        "command": harness.command_line(
            "benchmarks.sandbox", sys.argv[1:] if arguments is None else arguments
        ),
        "time": harness.now(),
        "machine": harness.machine(),
        "environment": harness.environment(),
        "notes": [],
        "settings": vars(options),
    }
    report |= measure_sandbox(options)
    print(as_text(report), file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(report, indent=2))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON; the tables go to standard error")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side after its warm-up")
    parser.add_argument("--workers", type=int, default=2, help="calls side by side, on every side")
    parser.add_argument("--calls", type=int, default=400, help="calls of the warm pool in one turn")
    parser.add_argument("--fresh-calls", type=int, default=10, help="calls of the other sides in one turn")
    return parser.parse_args(arguments)


def measure_sandbox(options: argparse.Namespace) -> dict[str, Any]:
    """Speeds of the three ways to run a `python` grader, in calls a second."""
    speeds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with Sandbox(workers=options.workers) as pool, ThreadPoolExecutor(options.workers) as threads:
        for name, source in SOURCES.items():
            turns: dict[str, tuple[Turn, int]] = {
                f"warm pool: {name}": (warm(pool, source), options.calls),
                f"fresh sandbox: {name}": (fresh_sandbox(threads, source), options.fresh_calls),
                f"fresh interpreter, no sandbox: {name}": (
                    fresh_interpreter(threads, source),
                    options.fresh_calls,
                ),
            }
            for turn, _ in turns.values():
                turn(options.workers)
            for _ in range(options.repeats):
                for side, (turn, calls) in turns.items():
                    before = cpu_seconds_here()
                    speeds.setdefault(side, []).append(calls_per_second(side, turn, calls))
                    if side.startswith("warm pool"):  # the others' processes are gone by now
                        cpu.setdefault(side, []).append((cpu_seconds_here() - before) / calls * 1000)
    ratios = {
        f"warm pool / {other}: {name}": ratio(speeds[f"warm pool: {name}"], speeds[f"{other}: {name}"])
        for name in SOURCES
        for other in ("fresh sandbox", "fresh interpreter, no sandbox")
    }
    return {
        "calls_per_second": {side: spread(own) for side, own in speeds.items()},
        "cpu_ms_per_call": {side: spread(own) for side, own in cpu.items()},
        "ratios": ratios,
    }


def cpu_seconds_here() -> float:
    """Processor time of this process, of its living descendants and of the dead ones that those waited for."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    for _ in range(8):  # generations
        ours |= {process for process, parent in parents.items() if parent in ours}
    own_dead = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(used[process] for process in ours & used.keys()) - own_dead.ru_utime - own_dead.ru_stime


def calls_per_second(side: str, turn: Turn, calls: int) -> float:
    """One turn; every value must be right."""
    started = time.perf_counter()
    values = turn(calls)
    speed = calls / (time.perf_counter() - started)
    if values != [1.0] * calls:
        raise ValueError(f"{side}: a grade is wrong: {values}")
    say(f"  {side}: {speed:.1f} calls/s")
    return speed


def call(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A sample of some length and its item."""
    text = "First we add, then we multiply. " * 20 + f"The answer is {number}"
    return {"output_text": text, "choices": [{"message": {"content": text}}]}, {"answer": str(number)}


def warm(pool: Sandbox, source: str) -> Turn:
    """All calls on the pool that is there."""

    def turn(calls: int) -> list[float]:
        return [result.value or 0.0 for result in pool.run_grade(source, [call(n) for n in range(calls)])]

    return turn


def fresh_sandbox(threads: ThreadPoolExecutor, source: str) -> Turn:
    """A sandbox of its own for each call."""

    def one(number: int) -> float:
        with Sandbox(workers=1) as sandbox:
            return sandbox.run_grade(source, [call(number)])[0].value or 0.0

    return lambda calls: list(threads.map(one, range(calls)))


def fresh_interpreter(threads: ThreadPoolExecutor, source: str) -> Turn:
    """An interpreter of its own for each call, unprotected."""

    def one(number: int) -> float:
        sample, item = call(number)
        given = json.dumps({"source": source, "sample": sample, "item": item})
        command = [sys.executable, "-c", FRESH]
        return float(subprocess.run(command, input=given, text=True, capture_output=True, check=True).stdout)

    return lambda calls: list(threads.map(one, range(calls)))


def as_text(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings = report["settings"]
    rows = [
        [side, cell(own, 1), cell(report["cpu_ms_per_call"].get(side), 1), TARGETS.get(side, "")]
        for side, own in report["calls_per_second"].items()
    ]
    return "\n".join(
        [
            harness.header(report),
            f"{settings['workers']} calls side by side, {settings['repeats']} turns",
            "",
            harness.table(["side", "calls/s: median (low-high)", "CPU ms a call", "target"], rows),
            "",
            harness.ratio_table(report["ratios"], {}),
        ]
    )


if __name__ == "__main__":
    main()
