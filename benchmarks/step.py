"""A whole GRPO step: graft against TRL's GRPOTrainer.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r requirements-bench.lock
    python -m benchmarks.step [--json]

8 prompts x 8 samples, exactly 40 new tokens, full fine-tune with fp32 master weights and bf16 products, no KL, one
optimiser step a batch. In the case `full` all groups have signal, in `sparse` three of eight have none. Seconds hold
loading the sampler, sampling, grading and the update; the first step is left out. TRL takes its first step with
gradient checkpointing on and off, and the faster setting is the peer. `..._against_fastest` compares with TRL's
faster type.
"""

from __future__ import annotations

import graft  # noqa: F401  sets the variables that every side inherits

# isort: split
import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT, Side, cell, ratio, say, spread
from graft.model import default_cache, resolve

CASES = ("full", "sparse")
TARGETS = {
    "ratio_full": ">= 4",
    "ratio_sparse": ">= 5.5",
    "memory_ratio": "<= 0.8",
    "memory_ratio_low": "<= 0.6",
}
PEER_PYTHON = ROOT / ".venv-bench" / "bin" / "python"

GRAFT = {"microbatch_tokens": 1024, "gradient_checkpointing": False}
LOW_MEMORY = {"microbatch_tokens": 512, "gradient_checkpointing": True}
"""Settings of `graft low memory`."""

PEER = "trl bf16"
PEER_FP32 = "trl fp32"
OWN = "graft"
OWN_LOW = "graft low memory"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and return what was printed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if not Path(options.trl_python).exists():
        sys.exit(
            f"{options.trl_python}: no such file. TRL runs in an environment of its own:\n"
            "  python -m venv .venv-bench && .venv-bench/bin/pip install -r requirements-bench.lock\n"
            "or name one with --trl-python."
        )
    machine = harness.machine()
    measured = measure_all(options)
    report = harness.report_of(
        "step",
        arguments,
        machine=machine,
        settings={k: getattr(options, k) for k in ("model", "prompts", "samples", "new_tokens", "repeats")},
        notes=[
            *harness.kernel_notes(),
            f"{PEER_FP32} was not measured."
            if options.skip_fp32
            else f"{PEER_FP32} took its turns after the others, with the checkpointing that was faster in bf16.",
            f"{OWN}: {describe(GRAFT)}. {OWN_LOW}: {describe(LOW_MEMORY)}. TRL: batches of {options.trl_batch}"
            f" samples, accumulated to {options.prompts * options.samples}.",
        ],
        figures=summarise(*measured),
    )
    harness.publish(report, as_text(report), as_json=options.json)
    return report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = harness.parser("step", __doc__, repeats=3, new_tokens=40)
    parser.add_argument("--trl-python", default=str(PEER_PYTHON), help="interpreter that can import trl")
    parser.add_argument(
        "--skip-fp32", action="store_true", help="leave out TRL in fp32 (and `_against_fastest`)"
    )
    parser.add_argument("--trl-batch", type=int, default=8, help="TRL's per_device_train_batch_size")
    return parser.parse_args(arguments)


Records = dict[str, list[dict[str, Any]]]
Facts = dict[str, dict[str, Any]]


def measure_all(options: argparse.Namespace) -> tuple[Records, Facts, dict[str, float]]:
    """Every side's measurements, what they say of themselves, and the peer's seconds by checkpointing setting."""
    folder = str(resolve(options.model, default_cache()))
    settings = {
        "model": folder,
        "prompts": options.prompts,
        "samples": options.samples,
        "new_tokens": options.new_tokens,
        "dtype": "bf16",
    }

    def peer(name: str, *, checkpointing: bool, dtype: str = "bf16") -> Side:
        say(f"starting {name}, gradient checkpointing {'on' if checkpointing else 'off'}")
        own = {
            **settings,
            "dtype": dtype,
            "gradient_checkpointing": checkpointing,
            "batch": options.trl_batch,
        }
        return Side(name, "benchmarks.step_trl", own, python=options.trl_python)

    def ours(name: str, changes: Mapping[str, Any]) -> Side:
        say(f"starting {name}")
        return Side(name, "benchmarks.step_graft", {**settings, **changes}, python=sys.executable)

    records: Records = {}
    about: Facts = {}
    tried: dict[bool, float] = {}
    with ExitStack() as stack:
        peers = {}
        for checkpointing in (False, True):
            peers[checkpointing] = stack.enter_context(peer(PEER, checkpointing=checkpointing))
            tried[checkpointing] = peers[checkpointing].measure("full", keep=False)["seconds"]
        faster = min(tried, key=lambda setting: tried[setting])
        peers[not faster].close()
        own = [stack.enter_context(ours(OWN, GRAFT)), stack.enter_context(ours(OWN_LOW, LOW_MEMORY))]
        for side in own:
            side.measure("full", keep=False)
        sides = [peers[faster], *own]
        harness.take_turns(sides, CASES, options.repeats, warm=True)
        for side in sides:
            records[side.name], about[side.name] = side.records, side.about
    if not options.skip_fp32:
        with peer(PEER_FP32, checkpointing=faster, dtype="fp32") as side:
            harness.take_turns([side], CASES, options.repeats)
            records[side.name], about[side.name] = side.records, side.about
    for name in {PEER, PEER_FP32} & set(about):
        about[name]["gradient_checkpointing"] = faster
    return records, about, {"on" if setting else "off": seconds for setting, seconds in tried.items()}


def describe(changes: Mapping[str, Any]) -> str:
    """Settings as `a = 1, b = True`."""
    return ", ".join(f"{name} = {value}" for name, value in changes.items())


def summarise(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    about: Mapping[str, Mapping[str, Any]],
    checkpointing_seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Seconds and memory of each side, and the ratios between them.

    Args:
        records: side -> its measurements, in the order of the turns.
        about: what each side said of itself.
        checkpointing_seconds: the peer's step with gradient checkpointing `on` and `off`.
    """
    harness.check_same({name: [r["tokens"] for r in own] for name, own in records.items()}, about)
    seconds = {
        name: {case: [r["seconds"] for r in own if r["case"] == case] for case in CASES}
        for name, own in records.items()
    }
    sides = {
        name: {
            "seconds": {case: spread(seconds[name][case]) for case in CASES},
            "cpu_seconds": {
                case: spread([r["cpu_seconds"] for r in own if r["case"] == case]) for case in CASES
            },
            "parts": {case: parts_of([r for r in own if r["case"] == case]) for case in CASES},
            "tokens": own[0]["tokens"],
            "tokens_computed": {
                case: next((r.get("tokens_computed") for r in own if r["case"] == case), None)
                for case in CASES
            },
            **about[name],
            "peak_memory_gb": own[-1]["peak_memory_gb"],  # by the end; `about` has that of the start
        }
        for name, own in records.items()
    }
    fastest = None
    if PEER_FP32 in sides:
        fastest = min((PEER, PEER_FP32), key=lambda name: sides[name]["seconds"]["full"]["median"])
    ratios = {}
    for suffix, own in (("", OWN), ("_low", OWN_LOW)):
        for case in CASES:
            name = f"ratio_{case}{suffix}"
            ratios[name] = ratio(seconds[PEER][case], seconds[own][case])
            if fastest is not None:
                ratios[f"{name}_against_fastest"] = ratio(seconds[fastest][case], seconds[own][case])
    cpu = {
        name: {case: [r["cpu_seconds"] for r in own if r["case"] == case] for case in CASES}
        for name, own in records.items()
    }
    cpu_ratios = {
        f"ratio_{case}{suffix}": ratio(cpu[PEER][case], cpu[own][case])
        for suffix, own in (("", OWN), ("_low", OWN_LOW))
        for case in CASES
    }
    memory = {name: side["peak_memory_gb"] for name, side in sides.items()}
    memory_ratios = {
        "memory_ratio": memory[OWN] / memory[PEER],
        "memory_ratio_low": memory[OWN_LOW] / memory[PEER],
    }
    if fastest is not None:
        memory_ratios["memory_ratio_against_fastest"] = memory[OWN] / memory[fastest]
        memory_ratios["memory_ratio_low_against_fastest"] = memory[OWN_LOW] / memory[fastest]
    return {
        "sides": sides,
        "peer_fastest": fastest,
        "peer_seconds_by_checkpointing": dict(checkpointing_seconds),
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "memory_ratios": memory_ratios,
    }


def parts_of(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Part of the step -> its seconds, for sides that tell."""
    names = records[0].get("parts", {})
    return {name: spread([r["parts"][name] for r in records]) for name in names}


def as_text(report: Mapping[str, Any]) -> str:
    """The tables."""
    settings, sides = report["settings"], report["sides"]
    speed = [
        [
            name,
            *(cell(side["seconds"][case]) for case in CASES),
            *(cell(side["cpu_seconds"][case], 1) for case in CASES),
            str(side["tokens"]),
            "-" if side["peak_memory_gb"] is None else f"{side['peak_memory_gb']:.2f}",
            side["kernels"],
        ]
        for name, side in sides.items()
    ]
    parts = [
        [f"{name}, {case}", *(cell(figures) for figures in own.values()), str(side["tokens_computed"][case])]
        for name, side in sides.items()
        for case, own in side["parts"].items()
        if own
    ]
    part_names = next(iter(own for side in sides.values() for own in side["parts"].values() if own), {})
    memory = [
        [name, f"{value:.2f}", TARGETS.get(name, "")] for name, value in report["memory_ratios"].items()
    ]
    tried = report["peer_seconds_by_checkpointing"]
    return "\n".join(
        [
            harness.header(report),
            f"{settings['prompts']} prompts x {settings['samples']} samples, exactly {settings['new_tokens']} new "
            f"tokens, {settings['repeats']} turns; seconds a step",
            "",
            harness.table(
                ["side", *CASES, *(f"CPU, {case}" for case in CASES), "sampled", "peak GB", "kernels"], speed
            ),
            "",
            harness.table(["seconds", *part_names, "tokens trained on"], parts),
            "",
            f"{PEER}, gradient checkpointing: "
            + ", ".join(f"{setting} {seconds:.1f} s" for setting, seconds in tried.items())
            + f"; the peer's faster type: {report['peer_fastest'] or 'not measured'}",
            harness.ratio_tables(report, TARGETS),
            "",
            harness.table(["memory, ours / peer", "ratio", "target"], memory),
        ]
    )


if __name__ == "__main__":
    main()
