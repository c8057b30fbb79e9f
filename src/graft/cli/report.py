"""`graft report RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import say


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]) -> None:
    """Write a run's report.html again, from its folder alone. Prints the path."""
    from graft.report.html import write_report

    print(write_report(run, say=say))
