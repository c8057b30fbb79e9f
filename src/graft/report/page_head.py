"""The top of the report page: what the run is, what training changed, and how far it came. Plain HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graft.report.metrics import Moment, Stage, find_metric
from graft.report.page_data import Run, run_seconds
from graft.report.text import duration_in_words, format_value, visible

_MOMENT_NAMES = {
    Moment.BEFORE: "Before",
    Moment.AFTER_WARM_START: "After warm start",
    Moment.DURING: "During training",
    Moment.AFTER: "After training",
}
_SCALES = (0.04, 0.08, 0.2, 0.4, 0.6, 0.8, 1.0)
_TABLE = (
    ("held_out_accuracy", "accuracy"),
    ("held_out_low", "low"),
    ("held_out_high", "high"),
    ("held_out_reward_mean", "reward"),
    ("held_out_length_mean", "tokens"),
    ("held_out_truncated_share", "truncated"),
    ("held_out_rows", "rows"),
)
_MEAN_OF_STEPS = 10


def page_title(run: Run) -> str:
    """Name of the page."""
    return f"{visible(run.name)} · graft"


def head(run: Run) -> str:
    """Title, result and facts."""
    return "\n".join((_title(run), _result(run), _facts(run)))


def footer(run: Run) -> str:
    """Where the numbers come from."""
    version = run.summary.get("version")
    made = f"graft {_safe(version)}" if version else "graft"
    return (
        f"Made by {made} from the run folder <code>{_safe(run.name)}</code>: config.toml, metrics.jsonl, "
        "trees.jsonl and summary.json. Intervals are 95 % Wilson intervals: they cover which rows happened "
        "to be drawn, not what another seed would do."
    )


def _title(run: Run) -> str:
    status, kind = _status(run)
    setting = " · ".join(
        part
        for part in (
            _safe(_setting(run, "model", "name")),
            _algorithm_name(run),
            f"seed {_safe(_setting(run, 'seed', default=0))}",
        )
        if part
    )
    error, early = run.summary.get("error"), run.summary.get("stopped_early")
    return (
        f'<header><p class="kind">graft run</p><div class="title"><h1>{_safe(run.name)}</h1>'
        f'<span class="status {kind}">{status}</span></div><p class="muted">{setting}</p>'
        + (f'<p class="warning">{_safe(error)}</p>' if error else "")
        + (f'<p class="muted">{_safe(early)}</p>' if early else "")
        + "</header>"
    )


def _status(run: Run) -> tuple[str, str]:
    """How far the run came, for people, and a class name."""
    made, planned = _steps(run)
    of_planned = f"{made:,} of {planned:,} steps" if planned and planned != made else f"{made:,} steps"
    if run.summary.get("stopped_early"):
        of_planned += ", early"
    status = run.summary.get("status")
    if status == "finished":
        return f"finished after {of_planned}", "finished"
    if status == "failed":
        return f"failed after {of_planned}", "failed"
    if status == "interrupted":
        return f"interrupted after {of_planned}", "interrupted"
    if status == "running":
        return f"{of_planned} when this page was made, not finished", "running"
    return f"{of_planned}; no summary: cut short or still running", "unknown"


def _steps(run: Run) -> tuple[int, int | None]:
    """Training steps made and to make; None if nothing says so."""
    made = len({record["step"] for record in run.of_stage(Stage.TRAIN)})
    return made, run.summary.get("steps") or _setting(run, "training", "steps", default=None)


def _result(run: Run) -> str:
    measured = [record for record in run.of_stage(Stage.EVALUATION) if "held_out_accuracy" in record]
    if not measured:
        return f'<div class="result alone card">{_reward_alone(run)}</div>'
    shown = [record for record in measured if record["moment"] != Moment.DURING]
    last = measured[-1]
    if last["moment"] == Moment.DURING:
        shown.append(last)
    return (
        f'<div class="result card"><div>{_headline(run, shown)}</div>'
        f'<div class="intervals" role="img" aria-label="{_safe("; ".join(map(_spoken, shown)))}">'
        f"{_intervals(shown)}</div></div>{_measurements(measured)}"
    )


def _headline(run: Run, shown: Sequence[Mapping[str, Any]]) -> str:
    first, last = shown[0], shown[-1]
    if first is last:
        return (
            f'<h2>Held-out accuracy, {_moment_name(first).lower()}</h2><p class="big"><span class="to">'
            f'{_percent(first)}</span></p><p class="muted">Measured once: nothing to compare it with yet.</p>'
        )
    parts = [
        "<h2>Held-out accuracy</h2>",
        f'<p class="big"><span class="from">{_percent(first)}</span><span class="arrow"> → </span>'
        f'<span class="to">{_percent(last)}</span></p>',
        f"<p>{_points(first, last)} on {_rows(first, last)}. {_shares(run, shown)}</p>",
    ]
    if last["moment"] == Moment.DURING:
        parts.append(
            f'<p class="warning">Last measured after step {last["step"]:,}; not measured at the end.</p>'
        )
    if _overlap(first, last):
        parts.append('<p class="warning">The intervals overlap: the difference may be chance.</p>')
    return "".join(parts)


def _shares(run: Run, shown: Sequence[Mapping[str, Any]]) -> str:
    """What the warm start and what the algorithm gave."""
    warm = [record for record in shown if record["moment"] == Moment.AFTER_WARM_START]
    if not warm or shown[0]["moment"] != Moment.BEFORE or shown[-1] is warm[0]:
        return ""
    return (
        f"The warm start gave {_points(shown[0], warm[0])}, "
        f"{_algorithm_name(run, short=True) or 'training'} {_points(warm[0], shown[-1])}."
    )


def _reward_alone(run: Run) -> str:
    """What there is to say of a run without held-out rows."""
    recorded = [record["reward_mean"] for record in run.of_stage(Stage.TRAIN) if "reward_mean" in record]
    rewards = [reward for reward in recorded if math.isfinite(reward)]
    note = '<p class="muted">Held-out rows were not measured: whether this holds on new rows is unknown.</p>'
    if broken := len(recorded) - len(rewards):
        note = f'<p class="warning">Steps without a finite reward, left out here: {broken:,}.</p>{note}'
    if not rewards:
        return f"<h2>Result</h2>{note}"
    metric, count = find_metric("reward_mean"), min(_MEAN_OF_STEPS, max(1, len(rewards) // 2))
    first, last = (format_value(metric, sum(part) / count) for part in (rewards[:count], rewards[-count:]))
    if len(rewards) == 1:
        return f'<h2>Training reward of the one step</h2><p class="big">{first}</p>{note}'
    return (
        f'<h2>Training reward, mean of the first and last {count} steps</h2><p class="big">'
        f'<span class="from">{first}</span><span class="arrow"> → </span>'
        f'<span class="to">{last}</span></p>{note}'
    )


def _intervals(shown: Sequence[Mapping[str, Any]]) -> str:
    highest = max(_finite(record.get("held_out_high", record["held_out_accuracy"])) for record in shown)
    top = next(scale for scale in _SCALES if scale >= min(highest, 1.0))
    rows = [_interval_row(record, top) for record in shown]
    ticks = "".join(f"<span>{100 * top * part / 4:g} %</span>" for part in range(5))
    return f'{"".join(rows)}<span class="ticks">{ticks}</span>'


def _interval_row(record: Mapping[str, Any], top: float) -> str:
    at = 100 * _finite(record["held_out_accuracy"]) / top
    kind, band, bounds = record["moment"], "", ""
    if _bounded(record):
        low, high = 100 * record["held_out_low"] / top, 100 * record["held_out_high"] / top
        band = f'<span class="band" style="left:{low:.2f}%;width:{high - low:.2f}%"></span>'
        bounds = f"<span>{100 * record['held_out_low']:.1f} to {100 * record['held_out_high']:.1f}</span>"
    return (
        f'<span class="label">{_moment_name(record)}</span><span class="track {kind}">{band}'
        f'<span class="dot" style="left:{at:.2f}%"></span></span>'
        f'<span class="value">{_percent(record)}{bounds}</span>'
    )


def _measurements(measured: Sequence[Mapping[str, Any]]) -> str:
    """All evaluations as a table, folded."""
    extra = dict.fromkeys(
        name for record in measured for name in record if name.startswith("held_out_pass_at_")
    )
    columns = [*_TABLE, *((name, name.removeprefix("held_out_").replace("_at_", "@")) for name in extra)]
    columns = [(name, label) for name, label in columns if any(name in record for record in measured)]
    headings = "".join(f'<th scope="col" class="number">{_safe(label)}</th>' for _, label in columns)
    rows = "".join(
        f'<tr><th scope="row">{_moment_name(record)}</th><td class="number">{record["step"]:,}</td>'
        + "".join(f'<td class="number">{_cell(record, name)}</td>' for name, _ in columns)
        + "</tr>"
        for record in measured
    )
    return (
        '<details class="fold"><summary>All measurements on held-out rows</summary><div class="scroll" '
        'tabindex="0" role="region" aria-label="All measurements on held-out rows"><table><thead><tr>'
        f'<th scope="col">Moment</th><th scope="col" class="number">step</th>{headings}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _facts(run: Run) -> str:
    summary, train = run.summary, run.of_stage(Stage.TRAIN)
    rows = [
        f"{summary[key]:,} {name}"
        for key, name in (("training_rows", "training"), ("held_out_rows", "held out"))
        if summary.get(key) is not None
    ]
    generated = train[-1].get("generated_tokens") if train else None
    engine = [str(summary[key]) for key in ("device", "dtype") if summary.get(key)]
    engine += [f"{summary['engine']} engine"] if summary.get("engine") else []
    engine += [f"{summary['threads']} threads"] if summary.get("threads") else []
    made, planned = _steps(run)
    facts = (
        ("Started", _time(summary.get("started_at"))),
        ("Duration", _duration(run)),
        ("Training steps", f"{made:,} of {planned:,}" if planned else f"{made:,}"),
        ("Samples a step", _samples_per_step(run)),
        ("Generated tokens", f"{generated:,}" if generated is not None else ""),
        ("Rows", ", ".join(rows)),
        ("Data", str(_setting(run, "data", "source"))),
        ("Parameters", f"{summary['parameters']:,}" if summary.get("parameters") else ""),
        ("Ran on", ", ".join(engine)),
    )
    entries = "".join(
        f"<div><dt>{name}</dt><dd>{_safe(value)}</dd></div>"
        for name, value in facts
        if value not in ("", None)
    )
    return f'<dl class="facts">{entries}</dl>'


def _duration(run: Run) -> str:
    start, end = (_parse_time(run.summary.get(key)) for key in ("started_at", "finished_at"))
    if start and end and end >= start:
        return duration_in_words((end - start).total_seconds())
    measured = run_seconds(run.records)
    return f"{duration_in_words(measured)} in recorded steps" if measured else ""


def _samples_per_step(run: Run) -> str:
    prompts = _setting(run, "training", "prompts_per_step", default=None)
    size = _setting(run, "algorithm", "group_size", default=None)
    if prompts and size:
        return f"{prompts} prompts × {size}"
    return f"{prompts} prompts" if prompts else ""


def _algorithm_name(run: Run, *, short: bool = False) -> str:
    name = str(_setting(run, "algorithm", "name"))
    name = name.upper() if len(name) <= 6 else name
    warm = "" if short or "warm_start" not in run.settings else " after a warm start"
    return _safe(name) + warm if name else ""


def _setting(run: Run, *path: str, default: Any = "") -> Any:
    value: Any = run.settings
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else value


def _parse_time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def _time(text: Any) -> str:
    time = _parse_time(text)
    if time is None:
        return str(text or "")
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".strip()


def _moment_name(record: Mapping[str, Any]) -> str:
    moment = Moment(record["moment"])
    return f"After step {record['step']:,}" if moment is Moment.DURING else _MOMENT_NAMES[moment]


def _bounded(record: Mapping[str, Any]) -> bool:
    ends = record.get("held_out_low"), record.get("held_out_high")
    return all(isinstance(end, int | float) and math.isfinite(end) for end in ends)


def _overlap(first: Mapping[str, Any], last: Mapping[str, Any]) -> bool:
    if not (_bounded(first) and _bounded(last)):
        return False
    return first["held_out_low"] <= last["held_out_high"] and last["held_out_low"] <= first["held_out_high"]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _points(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    difference = 100 * (last["held_out_accuracy"] - first["held_out_accuracy"])
    return f"{difference:+.1f} points".replace("-", "−")


def _rows(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    counts = dict.fromkeys(record["held_out_rows"] for record in (first, last) if "held_out_rows" in record)
    return f"{' and '.join(f'{count:,}' for count in counts)} rows" if counts else "held-out rows"


def _spoken(record: Mapping[str, Any]) -> str:
    ends = (
        f", interval {_cell(record, 'held_out_low')} to {_cell(record, 'held_out_high')}"
        if _bounded(record)
        else ""
    )
    return f"{_moment_name(record)}: {_percent(record)}{ends}"


def _percent(record: Mapping[str, Any]) -> str:
    return format_value(find_metric("held_out_accuracy"), record["held_out_accuracy"])


def _cell(record: Mapping[str, Any], name: str) -> str:
    return format_value(find_metric(name), record[name]) if name in record else "–"


def _safe(value: Any) -> str:
    return html.escape(visible(str(value)))
