"""`graft doctor RUN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_json, say
from graft.errors import DataError

BAD_VERDICT = 9
"""Exit code of `--strict`."""

WIDTH = 150
"""Columns of the table at most."""


def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, going on or ended.")],
    topic: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Key of the rows that names their topic, with dots for keys inside: which topics have no signal?",
        ),
    ] = None,
    out_of_distribution: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What `graft eval RUN --set data.held_out_source=OTHER.jsonl --json` printed: is less solved there?",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help=f"Exit with {BAD_VERDICT} if a verdict is bad.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a run, from its folder alone: a verdict, its reason and what to change for each check."""
    from rich.console import Console

    from graft.report.doctor.check import Verdict
    from graft.report.doctor.diagnosis import as_record, count_verdicts, diagnose
    from graft.report.doctor.evidence import read_evidence
    from graft.report.doctor.show import print_findings
    from graft.report.run_folder import RunFolder

    elsewhere = None if out_of_distribution is None else _read_evaluation(out_of_distribution)
    evidence = read_evidence(RunFolder.open(run), topic=topic, elsewhere=elsewhere)
    for line in evidence.left_out:
        say(f"left out: {line}")
    findings = diagnose(evidence)
    verdicts = count_verdicts(findings)
    if as_json:
        counts = {str(verdict): count for verdict, count in verdicts.items()}
        print_json({"run": str(run), "verdicts": counts, "findings": [as_record(each) for each in findings]})
    else:
        console = Console(highlight=False)
        console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
        print_findings(findings, console)
    if strict and verdicts[Verdict.BAD]:
        raise typer.Exit(BAD_VERDICT)


def _read_evaluation(path: Path) -> dict[str, Any]:
    wanted = "want what `graft eval --json` prints"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"rows": int(found["rows"]), "pass_at": {"1": {"mean": float(found["pass_at"]["1"]["mean"])}}}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {wanted}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {wanted}, got something else ({type(error).__name__}: {error})") from None
