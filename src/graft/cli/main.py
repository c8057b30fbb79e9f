"""The command `graft`. Imports no torch: each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from graft.cli.compare import compare
from graft.cli.doctor import BAD_VERDICT, doctor
from graft.cli.evaluate import evaluate
from graft.cli.grade import grade
from graft.cli.init import init
from graft.cli.model import model
from graft.cli.report import report
from graft.cli.resume import resume
from graft.cli.settings import settings
from graft.cli.train import train
from graft.cli.validate import validate
from graft.errors import GraftError
from graft.interrupt import Interrupted
from graft.version import VERSION

EXIT_CODES = {
    0: "done",
    1: "a failure that graft did not expect; the traceback says where",
    2: "the command line or a setting",
    3: "a row, a prompt or a chat template",
    4: "a model",
    5: "a reward function or grader",
    6: "a checkpoint",
    7: "memory or disk ran out, or a file of the run could not be written",
    8: "training diverged: a loss or gradient that is not finite; the newest checkpoint stays",
    BAD_VERDICT: "`graft doctor --strict`: a verdict is bad",
    130: "stopped by Ctrl-C; `graft resume` goes on",
    143: "stopped by SIGTERM; `graft resume` goes on",
}

ENVIRONMENT = {
    "GRAFT_CACHE": "folder for models and compiled kernels; default `~/.cache/graft`",
    "GRAFT_KERNELS": "`off`: go without the native kernels",
    "CXX": "C++ compiler that builds the native kernels",
    "GOMP_SPINCOUNT": "how long threads of GNU OpenMP spin before they sleep; set to a short time unless you set it "
    "or `OMP_WAIT_POLICY`",
    "ONEDNN_MAX_CPU_ISA": "cap of oneDNN's instruction set; set where oneDNN would die of a hypervisor that hides AMX, "
    "unless you set it",
}

EPILOGUE = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {why}" for code, why in EXIT_CODES.items())

app = typer.Typer(
    name="graft",
    help="Reinforcement fine-tuning of language models that you run yourself. Data goes to stdout, messages to "
    "stderr.",
    epilog=EPILOGUE,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("init")(init)
app.command("train")(train)
app.command("resume")(resume)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("report")(report)
app.command("doctor")(doctor)
app.command("validate")(validate)
app.command("grade")(grade)
app.add_typer(model, name="model")
app.command("settings")(settings)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(VERSION)
        raise typer.Exit


@app.callback()
def graft(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `graft` itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit; errors raised on purpose become one message and their exit code.

    Args:
        arguments: without the program's name; those of the process if not given.
    """
    try:
        get_command(app)(args=None if arguments is None else list(arguments), prog_name="graft")
    except GraftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stopped:
        print(f"interrupted ({stopped})", file=sys.stderr)
        sys.exit(stopped.exit_code)
