"""`graft resume RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, print_json, says_how_to_go_on
from graft.report.run_folder import RunFolder


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")], as_json: AsJson = False
) -> None:
    """Go on with a run from its newest checkpoint. Prints the run folder.

    The settings are those of RUN/config.toml, read anew. What may be edited there before: whatever does not decide
    which rows and weights the checkpoint is of, e.g. a judge's URL, a grader, timeouts, training.steps, a learning
    rate. Refused are another seed, data.shuffle or number of training rows, and another model or adapter.
    """
    RunFolder.open(run)
    with says_how_to_go_on(run):
        from graft.runs import resume_run

        resumed = resume_run(run)
    if as_json:
        print_json({"run": str(resumed.path), **resumed.summary})
    else:
        print(resumed.path)
