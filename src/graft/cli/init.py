"""`graft init [DIR]`: a task to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import say
from graft.errors import ConfigError

FILES = ("config.toml", "rows.jsonl", "grader.py")


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Made if it is not there. Default: here.")
    ] = Path(),
) -> None:
    """Write a task to start from: settings, ten rows and a reward function. Prints the files written."""
    taken = [str(folder / name) for name in FILES if (folder / name).exists()]
    if taken:
        raise ConfigError(f"{', '.join(taken)}: there already; nothing was written. Give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            text = (resources.files("graft.cli") / "new_task" / name).read_text(encoding="utf-8")
            (folder / name).write_text(text, encoding="utf-8")
            print(folder / name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}. Give another folder.") from None
    config = folder / "config.toml"
    train = f"graft train {config}"
    say(
        "\nNext:\n"
        f"  {train} --dry-run   # what it would take\n"
        f"  {train:<{len(train) + 10}}   # train; writes runs/first\n"
        f"  {'graft eval runs/first':<{len(train) + 10}}   # measure the result again"
    )
