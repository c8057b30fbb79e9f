"""`graft train CONFIG`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, Overrides, print_json, say, says_how_to_go_on


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings file, e.g. config.toml.")],
    overrides: Overrides = None,
    new: Annotated[
        bool,
        typer.Option("--new", help="If a run has the folder already, use the next free FOLDER-2, -3, ..."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read the rows, load the model, try a little of everything, the warm start in memory for at most "
            "about a minute, and print what the run would take: tokens, time, memory. Writes no run.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model as a settings file says. Prints the run folder."""
    from graft.config_file import load_config
    from graft.saved_runs import free_run_folder

    settings = load_config(config, overrides or ())
    if dry_run:
        from graft.trial import estimate_run

        found = estimate_run(settings, progress=say)
        if as_json:
            print_json(found.to_json())
        else:
            print(found.to_text())
        return
    if new:
        settings = settings.model_copy(update={"run": free_run_folder(settings.run)})
    with says_how_to_go_on(settings.run):
        from graft.runs import start_run

        run = start_run(settings)
    if as_json:
        print_json({"run": str(run.path), **run.summary})
    else:
        print(run.path)
