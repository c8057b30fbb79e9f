"""`graft compare CONFIG`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.common import AsJson, Overrides, print_json, say
from graft.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graft.comparison.entrants import Entry

WIDTH = 150
"""Columns of the table at most."""


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings file, e.g. config.toml.")],
    algorithms: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Algorithms to compare, with commas between.")
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="LABEL:KEY=VALUE,...",
            help="One more line: CONFIG's algorithm, or that of algorithm.name, with these settings of algorithm.*, "
            "optimizer.* and training.prompts_per_step. May be given more than once.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Seeds, from the one in CONFIG on.")] = 3,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens that each run generates for training. Default: training.generated_tokens of CONFIG.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="Held-out accuracy whose price in tokens and seconds is told."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the comparison. Default: CONFIG's run with -comparison behind it. What is there is gone on "
            "with: finished runs are kept, an interrupted one resumes.",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of finished runs.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train several algorithms on the same rows and seeds, from the same warm start, with equal budgets of tokens."""
    from graft.comparison.compare import RunStoppedError, entries_of
    from graft.comparison.compare import compare as carry_out
    from graft.comparison.entrants import read_entrants
    from graft.config_file import read_settings

    entrants = read_entrants(algorithms, variants or ())
    if out is None:
        out = Path(f"{read_settings(config, overrides or ()).get('run', config.stem)}-comparison")
    entries = entries_of(config, entrants, seeds=seeds, tokens=tokens, out=out, overrides=overrides or ())
    _say_what_was_left_out(entries)
    try:
        comparison = carry_out(entries, out, target=target, keep_checkpoints=keep_checkpoints, say=say)
    except RunStoppedError as stopped:
        say(f"{stopped} did not come to its end. What has finished is kept; the same command goes on.")
        raise typer.Exit(stopped.exit_code) from None
    _draw(comparison, out)
    if as_json:
        print_json({"out": str(out), **comparison})
    else:
        _print(comparison)
        say(f"{out}: comparison.json, comparison.md")


def _say_what_was_left_out(entries: Sequence[Entry]) -> None:
    for label, left_out in dict.fromkeys(
        (entry.label, entry.left_out) for entry in entries if entry.left_out
    ):
        say(f"{label}: left out, as they mean nothing to this algorithm: {', '.join(left_out)}")


def _draw(comparison: Mapping[str, Any], out: Path) -> None:
    from graft.report.comparison_plot import write_plot

    try:
        say(f"plot: {write_plot(comparison, out / 'comparison.png')}")
    except ConfigError as error:
        say(f"no plot: {error}")


def _print(comparison: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from graft.report.comparison import caption_of, table_of

    headings, rows = table_of(comparison)
    table = Table(caption=caption_of(comparison), caption_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for cells in rows:
        table.add_row(*cells)
    console = Console(highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    console.print(table)
