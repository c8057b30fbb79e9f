"""The findings as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graft.report.doctor.check import Finding, Verdict
from graft.report.doctor.diagnosis import count_verdicts
from graft.report.text import visible

STYLES = {Verdict.OK: "green", Verdict.LOOK: "yellow", Verdict.BAD: "bold red", Verdict.NOT_MEASURED: "dim"}


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """What was measured, then what was not."""
    measured = [finding for finding in findings if finding.verdict is not Verdict.NOT_MEASURED]
    if measured:
        console.print(_table(measured))
    for topics in (finding.details["topics"] for finding in findings if "topics" in finding.details):
        console.print(_topics(topics))
    missing = [finding for finding in findings if finding.verdict is Verdict.NOT_MEASURED]
    if missing:
        console.print(_missing(missing))
    console.print(
        Text(", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(findings).items()))
    )


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(show_lines=True, expand=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("check", ratio=3)
    table.add_column("value", ratio=4)
    table.add_column("threshold and reason; what to change", ratio=7)
    for finding in findings:
        check, style = finding.check, STYLES[finding.verdict]
        why = Text.assemble((f"{check.thresholds}. ", "bold"), check.reason)
        if finding.verdict is not Verdict.OK:
            why.append(f"\n→ {finding.change}", style=style)
        name = Text.assemble(check.title, "\n", (check.name, "dim"))
        table.add_row(Text(str(finding.verdict), style), name, Text(visible(finding.text)), why)
    return table


def _topics(topics: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="Topics", title_justify="left", title_style="bold")
    table.add_column("topic", overflow="fold")
    for heading in ("groups", "solved", "with signal"):
        table.add_column(heading, justify="right")
    for topic, row in topics.items():
        shares = (f"{100 * row[name]:.0f} %" for name in ("solve_rate", "with_signal"))
        table.add_row(Text(visible(topic)), f"{row['groups']:,}", *shares)
    return table


def _missing(findings: Sequence[Finding]) -> Table:
    table = Table(title="Not measured", title_justify="left", title_style="bold", expand=True)
    table.add_column("check", ratio=2)
    table.add_column("why not", ratio=5)
    for finding in findings:
        table.add_row(finding.check.title, Text(visible(finding.text)))
    return table
