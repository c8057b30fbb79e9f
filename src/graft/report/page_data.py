"""What the report page shows, read from a run folder: columns for the charts and a choice of samples.

Everything here is plain data; `html.py` writes it into the page and `page/*.js` draws it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.report.metrics import METRICS, Metric, Stage, find_metric
from graft.report.numbers import NUMBERS, in_order
from graft.report.page_prompts import pair_data, prompt_data
from graft.report.run_folder import RunFolder, to_plain
from graft.report.text import visible, without_noise
from graft.report.tree_lines import well_formed
from graft.report.trees import ShownPair, before_and_after, evenly, telling_pairs

MAX_PAIRS = 60
"""Held-out rows on the page."""

PROMPTS_PER_STEP = 8
CHARACTERS_ON_PAGE = 3_000_000
"""Limits that keep the page fast, the second of the samples' data; `trees.jsonl` has everything."""

CHARACTERS_HELD = 3 * CHARACTERS_ON_PAGE
"""Most data of samples in memory while the page is chosen; beyond it every second of the steps is given up."""

FEATURED = ("Reward", "Held-out accuracy")
"""Charts drawn larger, in this order."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder, read once."""

    name: str
    settings: Mapping[str, Any]
    config: str
    """Text of `config.toml`."""

    summary: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    shown_steps: Mapping[int, Sequence[Mapping[str, Any]]]
    """Training step to the prompts of it that the page shows, as `page_prompts.prompt_data` gives them."""

    pairs: Sequence[ShownPair]
    left_out: Sequence[str]
    """Lines of `trees.jsonl` that are no tree records, and why."""

    @property
    def threshold(self) -> float:
        """A score of at least this counts as solved."""
        return float(self.settings.get("evaluation", {}).get("threshold", 1.0))

    def of_stage(self, stage: Stage) -> list[Mapping[str, Any]]:
        """The records of one stage, in order."""
        return [record for record in self.records if record["stage"] == stage]


def read_run(folder: RunFolder, *, max_trees: int) -> Run:
    """Read what the page needs; `trees.jsonl` is passed through once and never held whole.

    Args:
        folder: any run folder, whatever its state.
        max_trees: most training trees kept, of steps at even distances.

    Raises:
        DataError: a file of the folder is damaged: a line is not JSON. A line of `trees.jsonl` that is JSON but no
            tree record is left out and named in `Run.left_out`.
    """
    settings, records = folder.read_settings(), folder.read_metrics()
    suffix = _suffix(settings)
    steps = sorted({record["step"] for record in records if record["stage"] == Stage.TRAIN})
    shown: dict[int, list[dict[str, Any]]] = {step: [] for step in evenly(steps, max(1, max_trees))}
    characters = dict.fromkeys(shown, 0)
    held_out: list[Mapping[str, Any]] = []
    left_out: list[str] = []
    for tree in well_formed(folder.read_trees(), left_out.append):
        if tree["stage"] == Stage.EVALUATION:
            held_out.append(tree)
        elif tree["step"] in shown and len(shown[tree["step"]]) < PROMPTS_PER_STEP:
            shown[tree["step"]].append(prompt_data(tree, suffix=suffix))
            characters[tree["step"]] += _characters(shown[tree["step"]][-1])
            while len(shown) > 1 and sum(characters[step] for step in shown) > CHARACTERS_HELD:
                shown = {step: shown[step] for step in evenly(list(shown), len(shown) // 2)}
    return Run(
        name=folder.path.resolve().name,
        settings=settings,
        config=folder.read_config(),
        summary=folder.read_summary(),
        records=records,
        shown_steps=_fit(_limit({step: prompts for step, prompts in shown.items() if prompts}, max_trees)),
        pairs=before_and_after(held_out),
        left_out=left_out,
    )


def page_data(run: Run) -> dict[str, Any]:
    """What the page's scripts draw, plain JSON."""
    clock = _clock(run.records)
    return {
        "charts": charts(run),
        "columns": {
            str(stage): _columns(run.records, stage, clock)
            for stage in Stage
            if any(record["stage"] == stage for record in run.records)
        },
        "steps": [{"step": step, "prompts": prompts} for step, prompts in run.shown_steps.items()],
        "numbers": [{"name": name, "meaning": NUMBERS.get(name, "")} for name in numbers_shown(run)],
        "pairs": [
            pair_data(pair, suffix=_suffix(run.settings))
            for pair in telling_pairs(run.pairs, MAX_PAIRS, threshold=run.threshold)
        ],
        "threshold": run.threshold,
    }


def numbers_shown(run: Run) -> list[str]:
    """Names of all numbers that a span on the page has, in the order of the columns."""
    nodes = (node for prompts in run.shown_steps.values() for prompt in prompts for node in prompt["nodes"])
    return in_order(name for node in nodes for name in node.get("numbers", {}))


def charts(run: Run) -> list[dict[str, Any]]:
    """The charts that have something to show, in order: title, stage, unit, and the metrics they draw with what each is
    called there."""
    found = []
    for title in chart_titles():
        for stage in _stages_of(run, title):
            metrics = _metrics_of(title)
            lines = {name: label for metric in metrics for name, label in _lines(run.records, stage, metric)}
            if lines:
                found.append(
                    {
                        "title": f"Warm-start {title.lower()}" if stage is Stage.WARM_START else title,
                        "declared": title,
                        "stage": str(stage),
                        "unit": metrics[0].unit,
                        "metrics": list(lines),
                        "labels": list(lines.values()),
                    }
                )
    return found


def _stages_of(run: Run, title: str) -> tuple[Stage, ...]:
    """Where a chart takes its values from. The loss of reinforcement says nothing; that of imitation does."""
    if title == "Held-out accuracy":
        return (Stage.EVALUATION,)
    if title == "Validation loss":
        return (Stage.EVALUATION, Stage.WARM_START)
    if title != "Loss":
        return (Stage.TRAIN,)
    rewarded = _measured(run.records, Stage.TRAIN, "reward_mean")
    return (Stage.WARM_START,) if rewarded else (Stage.TRAIN, Stage.WARM_START)


def chart_titles() -> list[str]:
    """All charts that the table of metrics declares, the featured ones first and the loss last."""
    titles = dict.fromkeys(metric.chart for metric in METRICS.values() if metric.chart)
    return [*FEATURED, *(title for title in titles if title not in (*FEATURED, "Loss")), "Loss"]


def chart_meaning(title: str) -> str:
    """What a chart shows, from the meanings of its metrics."""
    return " ".join(metric.meaning for metric in _metrics_of(title))


def run_seconds(records: Iterable[Mapping[str, Any]]) -> float:
    """Seconds spent in the recorded steps and evaluations."""
    return sum(_seconds(record) for record in records)


def _suffix(settings: Mapping[str, Any]) -> str:
    """What was added to the prompts that came from a key of the rows."""
    return str(settings.get("data", {}).get("suffix", ""))


def _metrics_of(title: str) -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.chart == title]


def _lines(records: Sequence[Mapping[str, Any]], stage: Stage, metric: Metric) -> list[tuple[str, str]]:
    """What a metric draws in its chart: recorded names with what each is called there, `<name>` by what it is."""
    if "<name>" not in metric.name:
        return [(metric.name, metric.label)] if _measured(records, stage, metric.name) else []
    names = dict.fromkeys(name for record in records if record["stage"] == stage for name in record)
    before, after = (len(part) for part in metric.name.split("<name>"))
    own = [name for name in names if metric.pattern.fullmatch(name) and find_metric(name) is metric]
    return [(name, visible(name[before : len(name) - after])) for name in own]


def _measured(records: Iterable[Mapping[str, Any]], stage: Stage, name: str) -> bool:
    return any(record["stage"] == stage and name in record for record in records)


def _limit(steps: dict[int, list[dict[str, Any]]], max_trees: int) -> dict[int, list[dict[str, Any]]]:
    """The steps at even distances that hold at most `max_trees` prompts together, one step at least."""
    most = max((len(prompts) for prompts in steps.values()), default=1)
    return {step: steps[step][:max_trees] for step in evenly(list(steps), max(1, max_trees // most))}


def _fit(steps: dict[int, list[dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    """Fewer steps, again at even distances, if the texts of all would make the page slow."""
    size = sum(_characters(prompt) for prompts in steps.values() for prompt in prompts)
    if size <= CHARACTERS_ON_PAGE:
        return steps
    return {
        step: steps[step] for step in evenly(list(steps), max(1, int(len(steps) * CHARACTERS_ON_PAGE / size)))
    }


def _characters(prompt: Mapping[str, Any]) -> int:
    return len(json.dumps(prompt, ensure_ascii=False))


def _seconds(record: Mapping[str, Any]) -> float:
    return record.get("step_seconds", 0.0) + record.get("evaluation_seconds", 0.0)


def _clock(records: Sequence[Mapping[str, Any]]) -> list[tuple[float | None, float]]:
    """For each record where it stands on the other two axes: tokens generated and seconds passed.

    Tokens are None when training did not record them.
    """
    generated: float | None = 0 if _measured(records, Stage.TRAIN, "generated_tokens") else None
    seconds, places = 0.0, []
    for record in records:
        generated = record.get("generated_tokens", generated)
        seconds += _seconds(record)
        places.append((generated, seconds))
    return places


def _columns(
    records: Sequence[Mapping[str, Any]], stage: Stage, clock: Sequence[tuple[float | None, float]]
) -> dict[str, list[Any]]:
    """The records of a stage as one list for each metric; null where a record does not have it."""
    rows = [
        (record, *place) for record, place in zip(records, clock, strict=True) if record["stage"] == stage
    ]
    names = dict.fromkeys(name for record, *_ in rows for name in record if name != "stage")
    columns = {name: [_number(record.get(name), name) for record, *_ in rows] for name in names}
    return {
        **columns,
        "generated_tokens": [generated for _, generated, _ in rows],
        "seconds": [round(seconds, 2) for *_, seconds in rows],
    }


def _number(value: Any, name: str) -> Any:
    """Six digits are more than a chart shows; what is not finite stays text, as in `metrics.jsonl`."""
    if value is None or find_metric(name).text:
        return value
    plain = to_plain(value)
    return float(f"{without_noise(plain):.6g}") if isinstance(plain, float) else plain
