"""Does `make demo` learn? The recipe on several seeds, a small result file each; a later call goes on from those.

    python -m benchmarks.learning --seeds 3            # table on stdout
    python -m benchmarks.learning --seeds 3 --json

Each seed is `graft train recipes/chain_sum/config.toml --set seed=N` in a process of its own: other rows, other
order, other samples. Held-out accuracy is measured at temperature 1 before training, after the warm start and
after GRPO.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from graft.platform import read_cpu
from graft.version import VERSION

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "chain_sum" / "config.toml"
RESULTS = Path(__file__).parent / "results"
KEYS = (
    "held_out_before",
    "held_out_warm",
    "held_out_after",
    "held_out_rows",
    "train_seconds",
    "generated_tokens",
)


def main() -> None:
    """Run the seeds that have no result yet, then print all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    results = [result_of(seed) for seed in range(arguments.seeds)]
    print(json.dumps(summarise(results), indent=2) if arguments.json else table(results))


def result_of(seed: int) -> dict[str, Any]:
    """What is stored for a seed of today's recipe, else the result of running it now."""
    path = RESULTS / f"learning-seed-{seed}.json"
    recipe = RECIPE.read_text(encoding="utf-8")
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["recipe"] == recipe:
            return stored
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "graft", "train", str(RECIPE), "--set", f"seed={seed}"]
        subprocess.run([*command, "--set", f"run={run}"], check=True)
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    result = {
        "seed": seed,
        **{key: summary[key] for key in KEYS},
        "machine": read_cpu().model_name,
        "version": VERSION,
        "recipe": recipe,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the smallest gain by GRPO alone."""
    gains = [result["held_out_after"] - result["held_out_warm"] for result in results]
    return {
        "seeds": [{key: value for key, value in result.items() if key != "recipe"} for result in results],
        "held_out_after_mean": statistics.fmean(result["held_out_after"] for result in results),
        "held_out_after_min": min(result["held_out_after"] for result in results),
        "gain_mean": statistics.fmean(gains),
        "gain_min": min(gains),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row a seed."""
    lines = [
        "| seed | before | after warm start | after GRPO | held-out rows | training, s | generated tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result['seed']} | {result['held_out_before']:.3f} | {result['held_out_warm']:.3f} | "
            f"{result['held_out_after']:.3f} | {result['held_out_rows']} | {result['train_seconds']:.0f} | "
            f"{result['generated_tokens']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
