"""The figures of README.md are those of the committed results of the commands beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def figures(words: str) -> list[tuple[float, float]]:
    """The numbers in the second cell of the row that begins so, and half a unit of the last place of each."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    [row] = [line for line in lines if line.startswith(f"| {words}")]
    found = re.findall(r"\d[\d,]*(?:\.\d+)?", row.split("|")[2].replace("fp32", "").replace("bf16", ""))
    plain = [number.replace(",", "") for number in found]
    places = [len(number.partition(".")[2]) or -3 * number.endswith("000") for number in plain]
    return [(float(number), 0.5001 * 10.0**-place) for number, place in zip(plain, places, strict=True)]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def engine() -> list[float]:
    found = result("engine")
    speeds = [found["sides"][side]["tokens_per_second"]["median"] for side in ("fast bf16", "hf bf16")]
    return [*speeds, found["ratios"]["ratio_fast_against_fastest"]["median"]]


def step() -> list[float]:
    found = result("step")
    names = ("ratio_full", "ratio_full_against_fastest", "ratio_sparse", "ratio_sparse_against_fastest")
    sides = ("graft", "graft low memory", "trl bf16", "trl fp32")
    memory = [found["sides"][side]["peak_memory_gb"] for side in sides]
    ratios = [found["ratios"][name]["median"] for name in names]
    return [*ratios[:2], 3, 8, *ratios[2:], *memory]


def learning() -> list[float]:
    seeds = [result(f"learning-seed-{seed}") for seed in range(3)]
    accuracies = [100 * own[f"held_out_{moment}"] for own in seeds for moment in ("warm", "after")]
    before = [100 * own["held_out_before"] for own in seeds]
    seconds = [own["train_seconds"] for own in seeds]
    return [*accuracies, min(before), max(before), min(seconds), max(seconds)]


def tree_behind_a_prompt() -> list[float]:
    case = result("tree")["cases"][1]
    tokens = [case["network_tokens_tree"], case["network_tokens_flat"]]
    return [*tokens, case["seconds_flat"]["median"] / case["seconds_tree"]["median"]]


def tree() -> list[float]:
    case = result("tree")["cases"][0]
    seconds = {how: case[f"seconds_{how}"]["median"] for how in ("flat", "prompt_shared", "tree")}
    tokens = [case["network_tokens_tree"], case["network_tokens_flat"]]
    return [*tokens, *(seconds[how] / seconds["tree"] for how in ("flat", "prompt_shared"))]


def graders() -> list[float]:
    found = result("graders")
    speeds = [found["samples_per_second"][name]["median"] for name in ("string_check", "fuzzy_match")]
    calls = found["calls_per_second"]["warm pool: plain"]["median"]
    fresh = found["ratios"]["warm pool against fresh interpreter, no sandbox: plain"]["median"]
    return [*speeds, calls, fresh]


def critic() -> list[float]:
    found = result("critic")
    shares = [found["shares"][name] for name in ("lines_parsed", "equations_called_wrong")]
    return [100 * share for share in (*shares, found["errors"]["wrong_result"]["found_at_the_step"])]


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        ("fast engine", engine()),
        (
            "generic engine",
            [result("engine")["ratios"][f"ratio_generic{of}"]["median"] for of in ("", "_fp32")],
        ),
        ("a whole GRPO step", step()),
        ("demo, three seeds", learning()),
        ("one training step on a tree", tree()),
        ("the same for 16 completions", tree_behind_a_prompt()),
        ("graders:", graders()),
        ("critic `equations`", critic()),
    ],
)
def test_figures(words, measured):
    said = figures(words)
    assert len(said) == len(measured)
    assert [number for number, _ in said] == [
        pytest.approx(own, abs=half) for own, (_, half) in zip(measured, said, strict=True)
    ]


LABELS = ["grpo", "reinforce", "dr_grpo", "gspo", "dapo", "rloo", "ppo", "ppo_reuse"]
"""Rows of the table of `graft compare`, as README has them."""


def runs_of(label: str) -> list[dict[str, Any]]:
    """The results of the three seeds."""
    comparison = "token_level_ppo" if label == "ppo_reuse" else "token_level"
    folder = ROOT / "benchmarks" / "results" / comparison / "runs" / label
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("seed-*.json"))]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    return runs


def test_tokens_of_ppo_to_those_of_grpo():
    def tokens(run: dict[str, Any]) -> int:
        return next(p["generated_tokens"] for p in run["curve"][1:] if p["accuracy"] >= 0.6)

    pairs = zip(runs_of("ppo_reuse"), runs_of("grpo"), strict=True)
    ratios = [tokens(ppo) / tokens(grpo) for ppo, grpo in pairs]
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"is at 60 % after ([\d.]+) to ([\d.]+) times GRPO's tokens", words)
    assert said is not None
    assert [float(number) for number in said.groups()] == pytest.approx(
        [min(ratios), max(ratios)], abs=0.0501
    )


@pytest.mark.parametrize("label", LABELS)
def test_comparison(label):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    [row] = [line for line in lines if line.startswith(f"| `{label}` |")]
    runs = runs_of(label)
    finals = [100 * run["curve"][-1]["accuracy"] for run in runs]
    shares = [run["groups_with_signal"] for run in runs if run["groups_with_signal"] is not None]
    final, signal = row.split("|")[2:4]
    said = [float(number) for number in re.findall(r"\d+\.\d+", final)]
    assert said == pytest.approx([sum(finals) / 3, min(finals), max(finals)], abs=0.0501)
    if shares:
        assert float(signal.strip(" %")) == pytest.approx(100 * sum(shares) / 3, abs=0.501)
    else:
        assert signal.strip() == "–"


STEP_METHODS = {
    "grpo": "GRPO",
    "ppo": "PPO",
    "every_segment": "RFT, `every_segment`",
    "shared": "RFT, `shared`",
    "grft_chain": "GRFT, chain",
    "grft_tree": "GRFT, tree",
}
"""Rows of the comparison on worked_steps."""


@pytest.mark.parametrize("label", STEP_METHODS)
def test_comparison_of_steps(label):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    [row] = [line for line in lines if line.startswith(f"| {STEP_METHODS[label]} |")]
    folder = ROOT / "benchmarks" / "results" / "worked_steps" / "runs"
    runs, base = (
        [json.loads((folder / name / f"seed-{seed}.json").read_text()) for seed in range(3)]
        for name in (label, "grpo")
    )
    finals = [100 * run["curve"][-1]["accuracy"] for run in runs]
    goals = [run["curve"][-1]["accuracy"] for run in base]
    reached = [
        next((point["generated_tokens"] for point in run["curve"][1:] if point["accuracy"] >= goal), None)
        for run, goal in zip(runs, goals, strict=True)
    ]
    segments = [own for run in runs if (own := run["segments_per_completion"]) is not None]
    final, tokens, cut = (cell.strip() for cell in row.split("|")[2:5])
    said = [float(number) for number in re.findall(r"\d+\.\d+", final)]
    assert said == pytest.approx([sum(finals) / 3, *finals], abs=0.0501)
    assert tokens == ", ".join("never" if own is None else f"{own / 1000:.0f}" for own in reached)
    if segments:
        means = [sum(own[fifth] for own in segments) / 3 for fifth in ("first", "last")]
        assert [float(number) for number in cut.split(", ")] == pytest.approx(means, abs=0.0501)
    else:
        assert cut == "–"
