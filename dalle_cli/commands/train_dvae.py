"""``dalle train-dvae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import DataOption, RecipeArgument, SetOption, folders, read_recipe, read_source, speaks


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run and its checkpoints. [RUN/dvae]")] = None,
    set_: SetOption = None,
) -> None:
    """Train the discrete VAE, which turns a picture into a grid of image tokens and back.

    Killed, it goes on from the newest checkpoint when run again, and ends with the same bytes. Runs on a GPU where
    there is one, and in several processes under torchrun, each on its part of every batch.

    Example: [bold]dalle train-dvae recipes/quickstart.yaml --data runs/shapes/train[/bold]
    """
    leads = speaks()
    settings = read_recipe(recipe, set_, data)
    source = read_source(settings)

    from dalle_cli.dvae.train import train_dvae

    checkpoint = train_dvae(settings, source, out or folders(settings).dvae)
    if leads:
        typer.echo(checkpoint.path)
