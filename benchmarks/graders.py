"""How many samples a second graders judge on one core.

    python -m benchmarks.graders [--seconds 1.0] [--rounds 5] [--json]

Each grader judges the same completions again and again, one at a time as in a run, in rounds that take turns; the
report has the median and the spread of the rounds. Judges and endpoints are as fast as their servers and are not here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.config import Grading
from graft.graders import open_grader
from graft.grading.build import BuiltGrader
from graft.grading.check import parse_grader
from graft.grading.offline import sample_of_text
from graft.platform import read_cpu
from graft.types import Sample

TEXT = {"input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
CHECK = {"type": "string_check", **TEXT, "operation": "eq"}
FUZZY = {"type": "text_similarity", **TEXT, "evaluation_metric": "fuzzy_match"}

CASES: Mapping[str, dict[str, Any]] = {
    "string_check": CHECK,
    "fuzzy_match": FUZZY,
    "rouge_l": {**FUZZY, "evaluation_metric": "rouge_l"},
    "bleu": {**FUZZY, "evaluation_metric": "bleu"},
    "number": {"type": "number", "key": "number"},
    "multi": {"type": "multi", "graders": {"a": CHECK, "b": FUZZY}, "calculate_output": "0.5*a + 0.5*b"},
}
"""Name -> grader. The sandbox's cases (warm workers beside a fresh interpreter a call) belong here too."""

AIMS = {"string_check": 20_000, "fuzzy_match": 2_000}
"""Samples a second."""


def completions() -> list[Sample]:
    """Answers of a few words up to a few lines, right and wrong."""
    made = []
    for n in range(200):
        steps = "\n".join(f"Step {k}: {n} plus {k} is {n + k}, so we go on." for k in range(n % 8))
        text = f"{steps}\nThe answer is {n + n % 3}."
        made.append(sample_of_text(text, {"answer": f"The answer is {n}.", "number": n}, row=n))
    return made


def measure(grader: BuiltGrader, samples: Sequence[Sample], seconds: float) -> float:
    """Samples a second of one round, CPU time of this thread."""
    done, began = 0, time.thread_time()
    while (spent := time.thread_time() - began) < seconds:
        for sample in samples:
            grader([sample])
        done += len(samples)
    return done / spent


def main() -> None:
    """Print the report as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of CPU time, each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON (the default is a table)")
    arguments = parser.parse_args()
    samples = completions()
    graders = {name: open_grader(parse_grader(spec), Grading(), base=Path()) for name, spec in CASES.items()}
    rates: dict[str, list[float]] = {name: [] for name in graders}
    for grader in graders.values():
        grader(samples)  # warm-up
    for _ in range(arguments.rounds):
        for name, grader in graders.items():
            rates[name].append(measure(grader, samples, arguments.seconds))
    report = {
        name: {
            "samples_per_s": round(statistics.median(values)),
            "least": round(min(values)),
            "most": round(max(values)),
            **({"aim": AIMS[name]} if name in AIMS else {}),
        }
        for name, values in rates.items()
    }
    if arguments.json:
        print(json.dumps({"cpu": read_cpu().model_name, "graders": report}, indent=2))
        return
    print(f"{read_cpu().model_name}, one core")
    for name, entry in report.items():
        aim = f", aim {entry['aim']}" if "aim" in entry else ""
        print(f"{name:<14} {entry['samples_per_s']:>8} /s  ({entry['least']} to {entry['most']}{aim})")


if __name__ == "__main__":
    main()
