"""Starts the sides, takes turns between them, and puts figures together. Knows no benchmark."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.platform import read_cpu

ROOT = Path(__file__).resolve().parent.parent

SHARED_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "LD_PRELOAD",
)
"""Environment variables that decide speed. All sides get the same, and the report names them."""

LOG_TAIL = 3000
"""Characters of a failed side's output that are shown."""


class SideFailed(Exception):  # noqa: N818 - reads as a sentence
    """A side's process ended before it answered; the message has the end of its output."""


class Side:
    """The process of one side."""

    def __init__(self, name: str, module: str, settings: Mapping[str, Any], *, python: str) -> None:
        """Start `python -m module` and wait until it is ready."""
        self.name = name
        self.records: list[dict[str, Any]] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def measure(self, case: str, *, keep: bool = True) -> dict[str, Any]:
        """Let the side do its work once; `keep=False` for a warm-up."""
        assert self._process.stdin is not None
        say(f"  {self.name}: {case}{'' if keep else ' (warm-up)'} ...", end="")
        before = cpu_seconds(self._process.pid)
        try:
            self._process.stdin.write(case + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells more
        record = {"case": case, **self._answer()}
        record["cpu_seconds"] = cpu_seconds(self._process.pid) - before
        say(
            f" {record['seconds']:.2f} s, CPU {record['cpu_seconds']:.1f} s, {record['peak_memory_gb']:.2f} GB"
        )
        if keep:
            self.records.append(record)
        return record

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise SideFailed(f"{self.name} ended with status {status}:\n{self._log.read()[-LOG_TAIL:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        if self._log.closed:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpu_seconds(pid: int) -> float:
    """What a process has used of all cores so far. Work beside the benchmark disturbs it far less than wall time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def take_turns(sides: Sequence[Side], cases: Sequence[str], repeats: int, *, warm: bool = False) -> None:
    """Warm every side up unless they are warm, then A B C, A B C, ... for each case."""
    for side in () if warm else sides:
        side.measure(cases[0], keep=False)
    for _ in range(repeats):
        for case in cases:
            for side in sides:
                side.measure(case)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of `above` over median of `below`; low and high are those of the rounds, each side's own turn."""
    rounds = [a / b for a, b in zip(above, below, strict=False)]
    return {
        "median": statistics.median(above) / statistics.median(below),
        "low": min(rounds),
        "high": max(rounds),
    }


def machine() -> dict[str, Any]:
    """The hardware and what stands on it."""
    cpu = read_cpu()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    flags = [f for f in ("avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile") if f in cpu.flags]
    return {
        "cpu": cpu.model_name,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory, 1),
        "cpu_flags": flags,
        "amx_palette_hidden": cpu.hides_amx_palette,
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def environment() -> dict[str, str]:
    """Variables that every side gets."""
    return {name: os.environ[name] for name in SHARED_VARIABLES if name in os.environ}


def kernel_notes() -> list[str]:
    """What must be known to read the ratios."""
    if not read_cpu().hides_amx_palette:
        return []
    return [
        "This machine announces AMX but hides the CPUID leaf that describes its tiles. oneDNN, which multiplies for"
        " torch, dies of that, so it is capped at AVX512_CORE_BF16 for all sides. graft's own kernels use AMX. Where"
        " oneDNN can use AMX too, the peer's bf16 is faster than here; the ratios against the peer's faster type"
        " (`..._against_fastest`) do not count the slow bf16 products of the capped library in graft's favour.",
    ]


def say(text: str, end: str = "\n") -> None:
    """Progress, to standard error."""
    print(text, end=end, file=sys.stderr, flush=True)


def header(report: Mapping[str, Any]) -> str:
    """Command, machine, environment and notes as text."""
    facts = report["machine"]
    lines = [
        f"$ {report['command']}",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GB, {' '.join(facts['cpu_flags'])}; load "
        f"{facts['load_before']} before the run",
        "environment of all sides: "
        + (" ".join(f"{k}={v}" for k, v in report["environment"].items()) or "nothing set"),
        *(f"note: {note}" for note in report["notes"]),
    ]
    return "\n".join(lines)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(titles), "  ".join("-" * w for w in widths), *map(line, rows)])


def cell(figures: Mapping[str, float] | None, digits: int = 2) -> str:
    """`median (low-high)`."""
    if figures is None:
        return "-"
    return f"{figures['median']:.{digits}f} ({figures['low']:.{digits}f}-{figures['high']:.{digits}f})"


def ratio_table(ratios: Mapping[str, Mapping[str, float]], targets: Mapping[str, str]) -> str:
    """Ratios with what they are meant to reach."""
    return table(
        ["ratio", "median (low-high)", "target"],
        [[name, cell(figures), targets.get(name, "")] for name, figures in ratios.items()],
    )


def check_same(tokens: Mapping[str, Sequence[int]], about: Mapping[str, Mapping[str, Any]]) -> None:
    """All sides must have had the same prompts and made as many tokens."""
    if len({n for own in tokens.values() for n in own}) > 1:
        raise ValueError(f"the sides made different numbers of tokens: {dict(tokens)}")
    if len({tuple(facts["prompt_tokens"]) for facts in about.values()}) > 1:
        raise ValueError(
            "the sides had prompts of different lengths: "
            f"{ {name: facts['prompt_tokens'] for name, facts in about.items()} }"
        )


def ratio_tables(report: Mapping[str, Any], targets: Mapping[str, str]) -> str:
    """The ratios of seconds and of CPU seconds."""
    return "\n".join(
        [
            ratio_table(report["ratios"], targets),
            "",
            "The same in CPU seconds, which work beside the benchmark hardly changes:",
            ratio_table(report["cpu_ratios"], {}),
        ]
    )


def parser(
    benchmark: str, description: str | None, *, repeats: int, new_tokens: int
) -> argparse.ArgumentParser:
    """The options that every benchmark has, with its own defaults."""
    options = argparse.ArgumentParser(
        f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--json", action="store_true", help="print JSON; the tables go to standard error")
    options.add_argument("--repeats", type=int, default=repeats, help="turns of each side after its warm-up")
    options.add_argument("--model", default="smollm2-135m-instruct")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--samples", type=int, default=8, help="for each prompt")
    options.add_argument("--new-tokens", type=int, default=new_tokens)
    return options


def report_of(
    benchmark: str,
    arguments: Sequence[str],
    *,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    notes: Sequence[str],
    figures: Mapping[str, Any],
) -> dict[str, Any]:
    """What `--json` prints: what was run, where and when, and its figures."""
    return {
        "benchmark": benchmark,
        "command": command_line(f"benchmarks.{benchmark}", arguments),
        "date": now(),
        "machine": machine,
        "environment": environment(),
        "settings": settings,
        "notes": notes,
        **figures,
    }


def publish(report: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the tables; as JSON the report, and the tables to standard error."""
    if as_json:
        say(text)
        print(json.dumps(report, indent=2))
    else:
        print(text)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """As typed."""
    return " ".join(["python -m", module, *arguments])


def now() -> str:
    """UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
