"""`graft model pull | list | export | chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.chat import chat
from graft.cli.common import AsJson, print_json, say

model = typer.Typer(
    name="model", help="Fetch, list, export and talk to models.", no_args_is_help=True, rich_markup_mode=None
)


@model.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An embedded model; `graft model list`.")],
) -> None:
    """Fetch an embedded model and make it ready. Prints its folder."""
    from graft.pull import default_cache, pull

    print(pull(name, default_cache(), say, check_hashes=True))


@model.command("list")
def list_embedded(as_json: AsJson = False) -> None:
    """List the embedded models: name, weights, licence and whether they are ready."""
    from graft.pull import default_cache, list_models

    listings = list_models(default_cache())
    if as_json:
        print_json(
            [
                {
                    "name": listing.model.name,
                    "parameters": listing.model.parameters,
                    "license": listing.model.license,
                    "description": listing.model.description,
                    "ready": listing.damage is None,
                    "state": listing.damage or "ready",
                    "folder": str(listing.folder),
                }
                for listing in listings
            ]
        )
        return
    width = max(len(listing.model.name) for listing in listings)
    for listing in listings:
        about = listing.model
        print(
            f"{about.name:<{width}}  {about.parameters / 1e6:>6.0f}M weights  {about.license}  "
            f"{listing.damage or 'ready'}  {about.description}"
        )


@model.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Written anew; must be empty or absent.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter alone, for PEFT, instead of merged weights.")
    ] = False,
    checkpoint: Annotated[
        int | None, typer.Option(metavar="STEP", help="Number of the checkpoint. Default: the newest.")
    ] = None,
) -> None:
    """Write a run's model as a folder that transformers (or PEFT) loads. Prints the folder."""
    from graft.saved_runs import load_run_weights, read_run_config

    config = read_run_config(run)
    from graft.assemble import choose_device, load_policy
    from graft.model import export

    policy = load_policy(config.model, choose_device("cpu"), seed=config.seed)
    step = load_run_weights(policy, run, checkpoint)
    export(policy, folder, merged=not adapter)
    say(f"{run}: checkpoint of step {step}")
    print(folder)


model.command("chat")(chat)
