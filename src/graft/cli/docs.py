"""Writes the generated pages, and the generated parts of pages: `python -m graft.cli.docs [FOLDER]`, default `docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from typer.main import get_command

from graft.cli import settings
from graft.cli.main import ENVIRONMENT, EXIT_CODES, app
from graft.cli.method_pages import filled_pages
from graft.report.doctor import diagnosis
from graft.report.metrics import EVERY_STAGE, METRICS


def render_pages() -> Mapping[str, str]:
    """Path below `docs/` -> text of every generated page."""
    return {
        "doctor.md": diagnosis.render_markdown(),
        "reference/cli.md": render_commands(),
        "reference/metrics.md": render_metrics(),
        "reference/settings.md": settings.render_markdown(),
    }


def render_metrics() -> str:
    """The page `docs/reference/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "What the records of `metrics.jsonl` hold, one JSON object a line. This page is generated from",
        "`src/graft/report/metrics.py`. A metric that was not measured is absent, never 0. A value that is",
        'not finite is written as the text `"NaN"`, `"Infinity"` or `"-Infinity"`.',
        "",
        "*Machine* marks what depends on the machine and its load: time and memory. Everything else is equal",
        "to the bit when a run is resumed or repeated on the same machine.",
        "",
        "| Metric | Unit | Recorded in | Higher is | Machine | Meaning |",
        "|---|---|---|---|---|---|",
    ]
    for metric in METRICS.values():
        cells = (
            f"`{metric.name}`",
            metric.unit,
            "every record"
            if metric.stages == EVERY_STAGE
            else ", ".join(f"`{stage}`" for stage in metric.stages),
            metric.higher_is or "",
            "yes" if metric.wall_clock else "",
            metric.meaning.replace("|", "\\|"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render_commands() -> str:
    """The page `docs/reference/cli.md`."""
    command = get_command(app)
    lines = [
        "# Command line",
        "",
        "This page is generated from `src/graft/cli/` by `python -m graft.cli.docs`.",
        "",
        _one_line(command.help),
        "Errors raised on purpose are one message on stderr; a failure that graft did not expect keeps its",
        "traceback.",
        "",
        "## Exit codes",
        "",
        "| Code | Meaning |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        "",
        "## Environment variables",
        "",
        "| Variable | Meaning |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in ENVIRONMENT.items()),
        "",
    ]
    for path, leaf in _leaves("graft", command):
        lines += [f"## `{_usage(path, leaf)}`", "", _one_line(leaf.help), ""]
        rows = [row for parameter in leaf.params if (row := _row(parameter)) is not None]
        if rows:
            lines += ["| Argument | Meaning |", "|---|---|", *rows, ""]
    return "\n".join(lines[:-1]) + "\n"


def _leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from _leaves(f"{path} {name}", inner)


def _usage(path: str, command: Any) -> str:
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    return " ".join([path, *arguments])


def _row(parameter: Any) -> str | None:
    """A line of the table; None for arguments without a help text."""
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
    else:
        name = "/".join(parameter.opts)
        if not parameter.is_flag:
            name += f" {parameter.metavar or parameter.name.upper()}"
    meaning = _one_line(parameter.help)
    shown = parameter.default
    if shown is not None and shown is not False and "Default:" not in meaning:
        meaning += f" Default: {shown}."
    return f"| `{name}` | {meaning.strip()} |".replace("|RUN", "\\|RUN")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def main(folder: Path) -> None:
    """Write all pages into a folder, and the generated parts of the methods' pages that are there."""
    for name, text in render_pages().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)
    for path, text in filled_pages(folder / "methods"):
        path.write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
