"""What a comparison came to: a run's result from its folder, a line for each algorithm, and the table. Pure.

A result has the curve of held-out accuracy: the measurements from where training began to its end, each with the tokens
generated and the seconds spent in training steps until then. Measuring and the warm start, which all share, cost
nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from graft.report.doctor.evidence import late_count
from graft.report.metrics import Moment, Stage
from graft.report.run_folder import RunFolder

JUDGE_TOKENS = (
    "judge_prompt_tokens",
    "judge_completion_tokens",
    "critic_prompt_tokens",
    "critic_completion_tokens",
)
"""Of judge models, whether they grade or criticise."""

OF_COMPLETIONS = {
    "segments_per_completion": "segments a completion",
    "completion_length_mean": "tokens a completion",
}
"""Metrics that are followed from the first fifth of the steps to the last -> their heading."""

NOTHING = "–"
"""Cell of what no seed has."""


def run_result(folder: RunFolder) -> dict[str, Any]:
    """What a finished run came to.

    Raises:
        DataError: its files are damaged.
    """
    records = folder.read_metrics()
    steps = [record for record in records if record["stage"] == Stage.TRAIN]
    with_signal = [record["groups_with_signal"] for record in steps if "groups_with_signal" in record]
    return {
        "steps": len(steps),
        "generated_tokens": max((record.get("generated_tokens", 0) for record in steps), default=0),
        "judge_tokens": sum(record.get(name, 0) for record in records for name in JUDGE_TOKENS),
        "seconds": sum(record.get("step_seconds", 0.0) for record in steps),
        "groups_with_signal": fmean(with_signal) if with_signal else None,
        **{name: first_and_last(steps, name) for name in OF_COMPLETIONS},
        "curve": curve_of(records),
    }


def first_and_last(steps: Sequence[Mapping[str, Any]], name: str) -> dict[str, float] | None:
    """Means of a metric over the `first` and the `last` fifth of the steps that have it; None where none has."""
    values = [record[name] for record in steps if name in record]
    if not values:
        return None
    count = late_count(len(values))
    return {"first": fmean(values[:count]), "last": fmean(values[-count:])}


def curve_of(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The measurements since training began, in order; the first is the model that it began with."""
    points: list[dict[str, Any]] = []
    tokens, seconds = 0, 0.0
    for record in records:
        if record["stage"] == Stage.TRAIN:
            tokens = record.get("generated_tokens", tokens)
            seconds += record.get("step_seconds", 0.0)
        elif "held_out_accuracy" in record:
            if record["moment"] in (Moment.BEFORE, Moment.AFTER_WARM_START):
                points.clear()
            point = {"step": record["step"], "generated_tokens": tokens, "seconds": seconds}
            points.append({**point, "accuracy": record["held_out_accuracy"], "rows": record["held_out_rows"]})
    return points


def summarise(results: Sequence[Mapping[str, Any]], *, target: float | None) -> list[dict[str, Any]]:
    """A line for each label, in order of appearance: every figure as its values over the seeds.

    Args:
        results: of runs, as `run_result` gives them, with `label`, `algorithm` and `seed`.
        target: a held-out accuracy; what the first measurement that reached it had cost. None: not asked.
    """
    lines = []
    for label in dict.fromkeys(result["label"] for result in results):
        own = [result for result in results if result["label"] == label]
        reached = (
            []
            if target is None
            else [p for r in own if (p := first_reaching(r["curve"], target)) is not None]
        )
        lines.append(
            {
                "label": label,
                "algorithm": own[0]["algorithm"],
                "seeds": [result["seed"] for result in own],
                "start_accuracy": spread([result["curve"][0]["accuracy"] for result in own]),
                "final_accuracy": spread([result["curve"][-1]["accuracy"] for result in own]),
                "best_accuracy": spread([max(p["accuracy"] for p in result["curve"]) for result in own]),
                "generated_tokens": spread([result["generated_tokens"] for result in own]),
                "seconds": spread([result["seconds"] for result in own]),
                "groups_with_signal": spread([result["groups_with_signal"] for result in own]),
                "judge_tokens": spread([result["judge_tokens"] for result in own]),
                # results of versions that did not follow these lack them
                **{name: spread_of_ends([result.get(name) for result in own]) for name in OF_COMPLETIONS},
                "steps": spread([result["steps"] for result in own]),
                "reached_target": None if target is None else len(reached),
                "tokens_to_target": spread([point["generated_tokens"] for point in reached]),
                "seconds_to_target": spread([point["seconds"] for point in reached]),
            }
        )
    return lines


def first_reaching(curve: Sequence[Mapping[str, Any]], target: float) -> Mapping[str, Any] | None:
    """The first measurement with at least this accuracy; None where there is none."""
    return next((point for point in curve if point["accuracy"] >= target), None)


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, standard deviation (N - 1; absent for one value) and ends; None where no seed has a value."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    found = {"mean": fmean(known), "low": min(known), "high": max(known)}
    return {**found, "std": stdev(known)} if len(known) > 1 else found


def spread_of_ends(values: Sequence[Mapping[str, float] | None]) -> dict[str, Any] | None:
    """`spread` of `first` and of `last`, and how many `seeds` have them; None where none has."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"seeds": len(known), **{end: spread([own[end] for own in known]) for end in ("first", "last")}}


def table_of(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells) for people: means, and lowest and highest seed behind them."""
    lines, target = comparison["lines"], comparison["target"]
    followed = _followed(lines)
    judged = any(line["judge_tokens"] and line["judge_tokens"]["high"] for line in lines)
    headings = ["", "seeds", "start", "final", "best"]
    if target is not None:
        headings += [f"tokens to {100 * target:g} %", f"seconds to {100 * target:g} %"]
    headings += ["tokens", "training, s", "groups with signal"]
    headings += [*(OF_COMPLETIONS[name] for name in followed), *(["judge tokens"] if judged else [])]
    rows = []
    for line in lines:
        cells = [line["label"], str(len(line["seeds"]))]
        cells += [
            _cell(line[name], share=True) for name in ("start_accuracy", "final_accuracy", "best_accuracy")
        ]
        if target is not None:
            cells += [_reached(line, name) for name in ("tokens_to_target", "seconds_to_target")]
        cells += [
            _cell(line["generated_tokens"]),
            _cell(line["seconds"]),
            _cell(line["groups_with_signal"], share=True),
            *(_ends(line, name) for name in followed),
        ]
        rows.append(cells + ([_cell(line["judge_tokens"])] if judged else []))
    return headings, rows


def caption_of(comparison: Mapping[str, Any]) -> str:
    """What the table's numbers are."""
    tokens = comparison["generated_tokens"]
    budget = (
        ""
        if tokens is None
        else f" Budget of a run: {tokens:,} generated tokens, the step that reaches it included."
    )
    ends = ""
    if _followed(comparison["lines"]):
        ends = " Figures of a completion: means of the first and of the last fifth of the steps."
    to_do = comparison["runs_to_do"]
    return (
        "Held-out accuracy: mean over seeds (lowest to highest). Training time without measuring and warm start."
        f"{ends}{budget}{f' Still to run: {to_do}.' if to_do else ''}"
    )


def markdown_page(comparison: Mapping[str, Any]) -> str:
    """`comparison.md`."""
    headings, rows = table_of(comparison)
    table = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([*lines, "", caption_of(comparison)]) + "\n"


def _followed(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of `OF_COMPLETIONS` that any line has."""
    return [name for name in OF_COMPLETIONS if any(line[name] for line in lines)]


def _reached(line: Mapping[str, Any], name: str) -> str:
    count = line["reached_target"]
    return _cell(line[name]) + _of_seeds(count, line) if count else "not reached"


def _ends(line: Mapping[str, Any], name: str) -> str:
    ends = line[name]
    if ends is None:
        return NOTHING
    return f"{ends['first']['mean']:,.1f} → {ends['last']['mean']:,.1f}" + _of_seeds(ends["seeds"], line)


def _of_seeds(count: int, line: Mapping[str, Any]) -> str:
    seeds = len(line["seeds"])
    return "" if count == seeds else f", {count} of {seeds} seeds"


def _cell(values: Mapping[str, float] | None, *, share: bool = False) -> str:
    if values is None:
        return NOTHING
    mean, low, high = (
        f"{100 * values[name]:.1f}" if share else f"{values[name]:,.0f}" for name in ("mean", "low", "high")
    )
    unit = " %" if share else ""
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"
