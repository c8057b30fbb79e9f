"""`report.html`: one file that shows a run, made from its folder alone, with nothing fetched from anywhere.

What is known beforehand is plain HTML (`page_head.py`); curves and samples are data that the scripts in
`page/` draw. A content security policy forbids the page everything but its own style and script. Text of
samples and settings comes in escaped, or as data that the scripts insert as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from graft.report.metrics import METRICS, Stage, find_metric
from graft.report.page_data import (
    FEATURED,
    PROMPTS_PER_STEP,
    Run,
    chart_meaning,
    chart_titles,
    page_data,
    read_run,
)
from graft.report.page_head import footer, head, page_title
from graft.report.run_folder import REPORT_FILE, RunFolder
from graft.report.text import visible
from graft.state.files import write_atomically

MAX_TREES = 400
"""Training trees on the page, of steps at even distances."""

_SCRIPTS = ("charts.js", "segments.js", "samples.js", "tree.js")
_STYLES = ("page.css", "samples.css")
_SMOOTH_FROM = 30
_LEFT_OUT_NAMED = 5
_AXES = (("step", "steps"), ("generated_tokens", "generated tokens"), ("seconds", "time"))
_CHANGES = (
    ("all", "All"),
    ("gained", "Newly right"),
    ("unsolved", "Still wrong"),
    ("lost", "Newly wrong"),
    ("kept", "Still right"),
)


def write_report(
    run_folder: str | Path, *, max_trees: int = MAX_TREES, say: Callable[[str], None] | None = None
) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Args:
        run_folder: the folder that a run wrote.
        max_trees: most training trees on the page; the steps shown are at even distances.
        say: told of lines that are left out because they are no tree records; the page names them too.

    Raises:
        DataError: the folder is not a run's, or a file in it is damaged.
        ResourceError: the disk is full; an older report stays.
    """
    folder = RunFolder.open(run_folder)
    path = folder.path / REPORT_FILE
    run = read_run(folder, max_trees=max_trees)
    write_atomically(path, render_report(run))
    if say is not None:
        for problem in run.left_out:
            say(f"{folder.path}: left out of the report: {problem}")
    return path


def render_report(run: Run) -> str:
    """The page as text."""
    data = page_data(run)
    script = _joined(_SCRIPTS)
    return _fill(
        _asset("page.html"),
        {
            "title": html.escape(page_title(run)),
            "style": _joined(_STYLES),
            "script": script,
            "script_hash": f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
            "head": head(run),
            "axis_switch": _axis_switch(data),
            "curves": _curves(run, data["charts"]),
            "pairs": _pairs(run, data["pairs"]),
            "samples": _samples(run, data["steps"]) + _numbers(data["numbers"]) + _left_out(run),
            "tree": _tree(data["steps"]),
            "config": html.escape(visible(run.config)) or "config.toml is missing from the run folder.",
            "meanings": _meanings(),
            "footer": footer(run),
            "data": embed(data),
        },
    )


def embed(data: Any) -> str:
    """JSON that no text in it can end or turn into markup: `<`, `>` and `&` are written as escapes."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (resources.files("graft.report") / "page" / name).read_text(encoding="utf-8").rstrip("\n")


def _joined(names: Sequence[str]) -> str:
    return "\n".join(_asset(name) for name in names)


def _fill(template: str, values: dict[str, str]) -> str:
    """Replace each `{{name}}` of the template; values are not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _axis_switch(data: dict[str, Any]) -> str:
    if not data["charts"]:
        return ""
    columns = data["columns"].get(str(Stage.TRAIN), {})
    counted = any(tokens is not None for tokens in columns.get("generated_tokens", ()))
    choices = "".join(
        f'<label><input type="radio" name="axis" value="{value}"{" checked" if value == "step" else ""}'
        f"{' disabled' if value == 'generated_tokens' and not counted else ''}><span>{name}</span></label>"
        for value, name in _AXES
    )
    return f'<fieldset class="switch"><legend>Along</legend>{choices}</fieldset>'


def _curves(run: Run, charts: list[dict[str, Any]]) -> str:
    shown = {chart["declared"] for chart in charts}
    usual = {metric.chart for metric in METRICS.values() if not metric.special}
    recorded = {find_metric(name).chart for record in run.records for name in record}
    missing = [title for title in chart_titles() if title in usual - recorded]
    undrawn = [title for title in chart_titles() if title in recorded and title not in shown]
    parts = []
    if charts:
        parts.append(
            f'<div class="charts">{"".join(_chart(index, chart) for index, chart in enumerate(charts))}</div>'
        )
    else:
        parts.append('<p class="note">No step was recorded before the run stopped.</p>')
    steps = len(run.of_stage(Stage.TRAIN))
    if steps >= _SMOOTH_FROM:
        parts.append(
            '<p class="note">Thin lines: each step. Thick lines: mean of the last '
            f"{max(5, round(steps / 20))} measured values.</p>"
        )
    if charts and missing:
        parts.append(f'<p class="note">Not measured in this run: {", ".join(missing).lower()}.</p>')
    if charts and undrawn:
        parts.append(
            f'<p class="note">Measured and not drawn, because it says little here: {", ".join(undrawn).lower()}. '
            "metrics.jsonl has it.</p>"
        )
    return "\n".join(parts)


def _chart(index: int, chart: dict[str, Any]) -> str:
    title, unit = html.escape(chart["title"]), html.escape(chart["unit"])
    featured = " featured" if chart["title"] in FEATURED else ""
    return (
        f'<figure class="chart card{featured}"><figcaption><h3><button type="button" class="term" '
        f'aria-describedby="tip-{index}">{title}</button>'
        f'<span class="tip" role="tooltip" id="tip-{index}">{_prose(chart_meaning(chart["declared"]))}</span>'
        f'<span class="unit">{unit}</span></h3><div class="readout"></div></figcaption>'
        f'<div class="plot"></div></figure>'
    )


def _pairs(run: Run, pairs: list[dict[str, Any]]) -> str:
    if not pairs:
        return f'<p class="note">{_why_no_pairs(run)}</p>'
    buttons = "".join(
        f'<button type="button" class="plain" data-change="{name}" aria-pressed="false">{label}</button>'
        for name, label in _CHANGES
    )
    shown = f"{len(pairs)} of {len(run.pairs)} rows are on this page. " if len(pairs) < len(run.pairs) else ""
    return (
        f'<div class="filters">{buttons}</div><div id="pair-list"></div>'
        f'<p class="note">{shown}Rows newly right, still wrong, newly wrong and still right take turns. '
        "Each row shows its first completion.</p>"
    )


def _why_no_pairs(run: Run) -> str:
    moments = {record.get("moment") for record in run.of_stage(Stage.EVALUATION)}
    if not moments:
        return "This run did not measure held-out rows."
    if "after" not in moments:
        return (
            "This run ended, or is, before the measurement after training: there is nothing to compare with."
        )
    return "The completions of held-out rows were not stored."


def _samples(run: Run, steps: list[dict[str, Any]]) -> str:
    total = len({record["step"] for record in run.of_stage(Stage.TRAIN)})
    if not steps:
        why = "No trees of training were stored." if total else "No training step was recorded."
        return f'<p class="note">{why}</p>'
    return (
        '<div class="controls card"><output id="step-name" for="step-slider"></output>'
        '<button type="button" class="plain" id="step-back" aria-label="Earlier step">←</button>'
        f'<input type="range" id="step-slider" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        'step="1" aria-label="Training step">'
        '<button type="button" class="plain" id="step-next" aria-label="Later step">→</button>'
        '<span class="summary" id="step-about" aria-live="polite"></span></div>'
        '<div id="step-samples"></div>'
        '<p class="note"><span class="legend"><span><span class="segment positive">advantage above 0</span> '
        'made more likely</span> <span><span class="segment negative">below 0</span> made less likely</span>'
        "</span></p>"
        f'<p class="note">{len(steps):,} of {total:,} steps are on this page, at even distances, with up to '
        f"{PROMPTS_PER_STEP} prompts each. trees.jsonl has all of them.</p>"
    )


def _numbers(numbers: list[dict[str, str]]) -> str:
    if not numbers:
        return ""
    meanings = "".join(
        f"<div><dt>{html.escape(number['name'])}</dt><dd>{_prose(number['meaning']) or 'not declared'}</dd></div>"
        for number in numbers
    )
    return (
        '\n<p class="note">Where a critic scored the thoughts: colour, edge and bar show the advantage of a segment '
        "beside the largest of its sample. What is missing was not measured.</p>"
        '<details class="fold numbers"><summary>What the numbers of a segment mean</summary>'
        f"<dl>{meanings}</dl></details>"
    )


def _tree(steps: list[dict[str, Any]]) -> str:
    """The viewer of one tree; out of sight until asked for where no tree branches."""
    if not steps:
        return ""
    hidden = "" if any("branches" in prompt for step in steps for prompt in step["prompts"]) else " hidden"
    return (
        f'<section id="tree" aria-labelledby="tree-title"{hidden}>'
        '<h2 id="tree-title" tabindex="-1">One prompt as a tree</h2>'
        '<div class="controls card"><label>Step <select id="tree-step"></select></label>'
        '<label>Prompt <select id="tree-row"></select></label>'
        '<button type="button" class="plain" id="tree-unfold">Unfold all</button>'
        '<button type="button" class="plain" id="tree-fold">Fold all</button>'
        '<span class="summary" id="tree-about" aria-live="polite"></span></div>'
        '<div id="tree-place"></div>'
        '<p class="note">Arrow keys move through the tree, fold and unfold; Enter or a click opens a span with its '
        "whole text and all its numbers. Spans drawn from one state stand together in a bracket.</p></section>"
    )


def _left_out(run: Run) -> str:
    if not run.left_out:
        return ""
    count = len(run.left_out)
    lines = "1 line is" if count == 1 else f"{count} lines are"
    named = "; ".join(run.left_out[:_LEFT_OUT_NAMED]) + ("; …" if count > _LEFT_OUT_NAMED else "")
    return f'\n<p class="note">{lines} no tree record and left out: {html.escape(visible(named))}.</p>'


def _meanings() -> str:
    return "\n".join(
        f"<tr><td><code>{html.escape(metric.name)}</code></td><td>{html.escape(metric.unit)}</td>"
        f"<td>{_prose(metric.meaning)}</td></tr>"
        for metric in METRICS.values()
    )


def _prose(markdown: str) -> str:
    """A declared meaning as HTML: escaped, with `code` marked up."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(markdown))
