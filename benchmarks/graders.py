"""How fast graders judge.

    python -m benchmarks.graders [--repeats 5] [--seconds 1.0] [--workers 2] [--json]

One core: samples a second of processor time, each grader on the same completions, one at a time as in a run. Judges and
endpoints are as fast as their servers and are not here.

`python` graders: calls a second of the sandbox's warm pool, beside what it replaces on the same calls: a fresh sandbox
for each call, and a fresh interpreter for each call without any sandbox. Processor time counts all processes, and work
beside the benchmark disturbs it far less than calls a second; that of fresh sandboxes cannot be read, since they end
with nobody waiting for them.

All sides take turns in one run. The report has the median and the spread of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import cell, ratio, say, spread
from graft.config import Grading
from graft.graders import open_grader
from graft.grading.build import BuiltGrader
from graft.grading.check import parse_grader
from graft.grading.offline import sample_of_text
from graft.grading.sandbox import Sandbox
from graft.types import Sample

TEXT = {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
CHECK = {"type": "string_check", **TEXT, "operation": "eq"}
FUZZY = {"type": "text_similarity", **TEXT, "evaluation_metric": "fuzzy_match"}

GRADERS: Mapping[str, dict[str, Any]] = {
    "string_check": CHECK,
    "fuzzy_match": FUZZY,
    "rouge_l": {**FUZZY, "evaluation_metric": "rouge_l"},
    "bleu": {**FUZZY, "evaluation_metric": "bleu"},
    "number": {"type": "number", "key": "number"},
    "multi": {"type": "multi", "graders": {"a": CHECK, "b": FUZZY}, "calculate_output": "0.5*a + 0.5*b"},
}
"""Name -> grader that this process runs itself."""

SOURCES: Mapping[str, str] = {
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
"""Two `python` graders: one of the standard library alone, one that imports numpy."""

FRESH = """
import json, sys
call = json.load(sys.stdin)
namespace = {}
exec(call["source"], namespace)
print(float(namespace["grade"](call["sample"], call["item"])))
"""
"""What a fresh interpreter runs."""

POOL, FRESH_SANDBOX, INTERPRETER = "warm pool", "fresh sandbox", "fresh interpreter, no sandbox"

TARGETS = {"string_check": 20_000, "fuzzy_match": 2_000, f"{POOL}: plain": 200}
"""Samples a second on one core, and calls a second on two."""

Turn = Callable[[int], list[float]]
"""Grades so many calls, and returns the values."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way to run a `python` grader."""

    name: str
    turn: Turn
    calls: int
    """In one turn."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    machine = harness.machine()
    report = harness.report_of(
        "graders", arguments, machine=machine, settings=vars(options), notes=[], figures=measure(options)
    )
    harness.publish(report, as_text(report), as_json=options.json)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.graders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON; the tables go to standard error")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side after its warm-up")
    parser.add_argument("--seconds", type=float, default=1.0, help="processor time of one turn on one core")
    parser.add_argument("--workers", type=int, default=2, help="calls side by side, on every sandbox side")
    parser.add_argument("--calls", type=int, default=400, help="calls of the warm pool in one turn")
    parser.add_argument("--fresh-calls", type=int, default=10, help="calls of the other sides in one turn")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides, turn by turn."""
    samples = completions()
    graders = {
        name: open_grader(parse_grader(spec), Grading(), base=Path()) for name, spec in GRADERS.items()
    }
    rates: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with Sandbox(workers=options.workers) as pool, ThreadPoolExecutor(options.workers) as threads:
        sides = sides_of(pool, threads, options)
        for grader in graders.values():
            grader(samples)
        for side in sides:
            side.turn(options.workers)
        for _ in range(options.repeats):
            for name, grader in graders.items():
                rates.setdefault(name, []).append(samples_per_second(name, grader, samples, options.seconds))
            for side in sides:
                before = cpu_seconds()
                speeds.setdefault(side.name, []).append(calls_per_second(side))
                if not side.name.startswith(FRESH_SANDBOX):
                    cpu.setdefault(side.name, []).append((cpu_seconds() - before) / side.calls * 1000)
    for grader in graders.values():
        grader.close()
    figures = {
        "samples_per_second": {name: spread(own) for name, own in rates.items()},
        "calls_per_second": {name: spread(own) for name, own in speeds.items()},
        "cpu_ms_per_call": {name: spread(own) for name, own in cpu.items()},
        "ratios": {},
        "cpu_ratios": {},
    }
    for source in SOURCES:
        for other in (FRESH_SANDBOX, INTERPRETER):
            pooled, fresh = f"{POOL}: {source}", f"{other}: {source}"
            name = f"{POOL} against {other}: {source}"
            figures["ratios"][name] = ratio(speeds[pooled], speeds[fresh])
            if fresh in cpu:
                figures["cpu_ratios"][name] = ratio(cpu[fresh], cpu[pooled])
    return {**figures, "targets": targets_met(figures, options.workers)}


def targets_met(figures: Mapping[str, Any], workers: int) -> dict[str, dict[str, Any]]:
    """Each target with what was measured."""
    measured = {**figures["samples_per_second"], **figures["calls_per_second"]}
    return {
        name: {"at_least": wanted, "measured": measured[name]["median"], "met": measured[name]["median"] >= wanted}
        for name, wanted in TARGETS.items()
        if name in GRADERS or workers == 2
    }  # fmt: skip


# -- one core -------------------------------------------------------------------------------------------------


def completions() -> list[Sample]:
    """Answers of a few words up to a few lines, right and wrong."""
    made = []
    for n in range(200):
        steps = "\n".join(f"Step {k}: {n} plus {k} is {n + k}, so we go on." for k in range(n % 8))
        text = f"{steps}\nThe answer is {n + n % 3}."
        made.append(sample_of_text(text, {"answer": f"The answer is {n}.", "number": n}, row=n))
    return made


def samples_per_second(name: str, grader: BuiltGrader, samples: Sequence[Sample], seconds: float) -> float:
    """One turn, in processor time of this thread."""
    done, began = 0, time.thread_time()
    while (spent := time.thread_time() - began) < seconds:
        for sample in samples:
            grader([sample])
        done += len(samples)
    say(f"  {name}: {done / spent:.0f} samples/s")
    return done / spent


# -- the sandbox and what it replaces ---------------------------------------------------------------------------


def sides_of(pool: Sandbox, threads: ThreadPoolExecutor, options: argparse.Namespace) -> list[Side]:
    """The three ways to run each source."""
    sides = []
    for name, source in SOURCES.items():
        sides += [
            Side(f"{POOL}: {name}", warm(pool, source), options.calls),
            Side(f"{FRESH_SANDBOX}: {name}", fresh_sandbox(threads, source), options.fresh_calls),
            Side(f"{INTERPRETER}: {name}", fresh_interpreter(threads, source), options.fresh_calls),
        ]
    return sides


def calls_per_second(side: Side) -> float:
    """One turn; every value must be right."""
    started = time.perf_counter()
    values = side.turn(side.calls)
    speed = side.calls / (time.perf_counter() - started)
    if values != [1.0] * side.calls:
        raise ValueError(f"{side.name}: a grade is wrong: {values}")
    say(f"  {side.name}: {speed:.1f} calls/s")
    return speed


def cpu_seconds() -> float:
    """Processor time of this process and its living descendants, and of the dead ones that they waited for."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            used[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    for _ in range(8):  # generations
        ours |= {process for process, parent in parents.items() if parent in ours}
    return sum(used[process] for process in ours & used.keys())


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


# -- tables -----------------------------------------------------------------------------------------------------


def as_text(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings, targets = report["settings"], report["targets"]

    def target(name: str) -> str:
        return (
            f">= {TARGETS[name]:,}: {'met' if targets[name]['met'] else 'missed'}" if name in targets else ""
        )

    one_core = [[name, cell(own, 0), target(name)] for name, own in report["samples_per_second"].items()]
    sides = [
        [name, cell(own, 1), cell(report["cpu_ms_per_call"].get(name), 1), target(name)]
        for name, own in report["calls_per_second"].items()
    ]
    return "\n".join(
        [
            harness.header(report),
            f"{settings['repeats']} turns; median (low-high)",
            "",
            harness.table(["one core", "samples/s of CPU time", "target"], one_core),
            "",
            harness.table(
                [f"{settings['workers']} side by side", "calls/s", "CPU ms a call", "target"], sides
            ),
            "",
            harness.ratio_tables(report, {}),
        ]
    )


if __name__ == "__main__":
    main()
