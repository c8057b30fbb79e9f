"""`graft validate FILE...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, print_json, say


def validate(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="A grader or the body of a fine-tuning job (.json), rows (.jsonl, .csv), settings (.toml), "
            "whose own grader, functions and rows are checked. Rows are also checked against the grader.",
        ),
    ],
    reference_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Key of the rows that holds a right answer: it must get full marks. Also shows what an empty, a "
            "wrong and a truncated answer get.",
        ),
    ] = None,
    prompt_key: Annotated[
        str, typer.Option(metavar="KEY", help="Column with the prompt of rows without `messages`.")
    ] = "prompt",
    as_json: AsJson = False,
) -> None:
    """Check graders and rows, without a model and without a network unless the grader asks a server."""
    from graft.grading.check import dump_grader
    from graft.validation import check_files, error_of, lines_of, try_out

    found = check_files(files, prompt_key=prompt_key)
    trials = []
    if reference_key is not None and not found.problems:
        trials = try_out(found, reference_key)
    if as_json:
        print_json(
            {
                "files": found.files,
                "rows": len(found.rows),
                "grader": None if found.grader is None else dump_grader(found.grader),
                "problems": found.problems,
                "notes": found.notes,
                "trials": [
                    {"kind": trial.kind, "mean": trial.mean, "failed": trial.failed} for trial in trials
                ],
            }
        )
    else:
        for line in [*found.problems, *lines_of(trials)]:
            print(line)
        for note in found.notes:
            say(f"note: {note}")
        say(_verdict(len(found.problems), len(found.rows)))
    error = error_of(found)
    if error is not None:
        raise typer.Exit(error.exit_code)


def _verdict(problems: int, rows: int) -> str:
    counted = "1 problem" if problems == 1 else f"{problems} problems"
    return f"{counted if problems else 'no problems'}, {rows} usable rows"
