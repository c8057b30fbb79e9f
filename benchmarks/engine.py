"""Sampling: graft's two decode paths against transformers' `generate`.

    python -m benchmarks.engine [--json]

64 sequences (8 prompts of about 50 tokens, 8 samples each), 64 new tokens, no end of sequence, the model's own
distribution at temperature 1. Seconds hold everything from token ids to token ids, the prompts' own pass included,
and the first call is left out. Ratios are of tokens a second.
"""

from __future__ import annotations

import graft  # noqa: F401  sets the variables that every side inherits

# isort: split
import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks import harness
from benchmarks.harness import Side, cell, ratio, say, spread

SIDES = ("hf", "generic", "fast")
TYPES = ("bf16", "fp32")
TARGETS = {"ratio_generic": ">= 2", "ratio_fast": ">= 3"}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return what was printed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    machine = harness.machine()
    settings = {k: getattr(options, k) for k in ("model", "prompts", "samples", "new_tokens")}
    records: dict[str, list[dict[str, Any]]] = {}
    about: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        sides = []
        for dtype in TYPES:
            for name in SIDES:
                say(f"starting {name} {dtype}")
                own = {**settings, "side": name, "dtype": dtype}
                sides.append(
                    stack.enter_context(
                        Side(f"{name} {dtype}", "benchmarks.engine_side", own, python=sys.executable)
                    )
                )
        harness.take_turns(sides, ["generate"], options.repeats)
        for side in sides:
            records[side.name], about[side.name] = side.records, side.about
    report = harness.report_of(
        "engine",
        arguments,
        machine=machine,
        settings={**settings, "repeats": options.repeats},
        notes=harness.kernel_notes(),
        figures=summarise(records, about),
    )
    harness.publish(report, as_text(report), as_json=options.json)
    return report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    return harness.parser("engine", __doc__, repeats=5, new_tokens=64).parse_args(arguments)


def summarise(
    records: Mapping[str, Sequence[Mapping[str, Any]]], about: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Speed and memory of each side, and the ratios between them.

    Args:
        records: side (`hf bf16`, ...) -> its measurements, in the order of the turns.
        about: what each side said of itself.
    """
    speed = {name: [r["tokens"] / r["seconds"] for r in own] for name, own in records.items()}
    harness.check_same({name: [r["tokens"] for r in own] for name, own in records.items()}, about)
    sides = {
        name: {
            "tokens_per_second": spread(speed[name]),
            "seconds": spread([r["seconds"] for r in own]),
            "cpu_seconds": spread([r["cpu_seconds"] for r in own]),
            "tokens": own[0]["tokens"],
            "peak_memory_gb": own[-1]["peak_memory_gb"],
            **about[name],
        }
        for name, own in records.items()
    }
    fastest = max(("hf bf16", "hf fp32"), key=lambda name: sides[name]["tokens_per_second"]["median"])
    ratios = {}
    for name in ("generic", "fast"):
        ratios[f"ratio_{name}"] = ratio(speed[f"{name} bf16"], speed["hf bf16"])
        ratios[f"ratio_{name}_fp32"] = ratio(speed[f"{name} fp32"], speed["hf fp32"])
        ratios[f"ratio_{name}_against_fastest"] = ratio(speed[f"{name} bf16"], speed[fastest])
    cpu = {name: [r["cpu_seconds"] for r in own] for name, own in records.items()}
    cpu_ratios = {f"ratio_{name}": ratio(cpu["hf bf16"], cpu[f"{name} bf16"]) for name in ("generic", "fast")}
    return {"sides": sides, "peer_fastest": fastest, "ratios": ratios, "cpu_ratios": cpu_ratios}


def as_text(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings = report["settings"]
    rows = [
        [
            name,
            cell(side["tokens_per_second"], 0),
            cell(side["seconds"]),
            cell(side["cpu_seconds"], 1),
            f"{side['peak_memory_gb']:.2f}",
            side["kernels"],
        ]
        for name, side in report["sides"].items()
    ]
    return "\n".join(
        [
            harness.header(report),
            f"{settings['prompts']} prompts x {settings['samples']} samples, {settings['new_tokens']} new tokens, "
            f"{settings['repeats']} turns",
            "",
            harness.table(["side", "tokens/s", "seconds", "CPU seconds", "peak GB", "kernels"], rows),
            "",
            f"the peer's faster type: {report['peer_fastest']}",
            harness.ratio_tables(report, TARGETS),
        ]
    )


if __name__ == "__main__":
    main()
