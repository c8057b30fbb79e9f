"""What the commands share. Messages go to stderr, data to stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.interrupt import Interrupted
from graft.report.run_folder import to_plain

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, e.g. --set training.steps=30. May be given more than once. "
        "`graft settings` lists them.",
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def say(line: str) -> None:
    """A message for people."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Data for scripts. Numbers that are not finite become text, as in `metrics.jsonl`."""
    print(json.dumps(to_plain(value), indent=2, allow_nan=False))


@contextmanager
def says_how_to_go_on(run: str | Path) -> Iterator[None]:
    """When the user stops a run, say how to go on with it, and exit with 128 + the signal's number."""
    try:
        yield
    except Interrupted as stopped:
        say(f"interrupted ({stopped}): a checkpoint is written. Go on with: graft resume {run}")
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt:  # before the first step, or the second Ctrl-C
        from graft.saved_runs import holds_run

        if holds_run(run):
            say(f"stopped at once, without a checkpoint of this moment. Go on with: graft resume {run}")
        else:
            say("stopped before the run began: nothing was written")
        raise typer.Exit(130) from None
