"""``dalle train-dvae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import (
    DataOption,
    GpusOption,
    RecipeArgument,
    SetOption,
    WandbOption,
    folders,
    read_recipe,
    read_source,
    speaks,
    starts_processes,
)


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run and its checkpoints. [RUN/dvae]")] = None,
    set_: SetOption = None,
    gpus: GpusOption = None,
    wandb: WandbOption = None,
) -> None:
    """Train the discrete VAE, which turns a picture into a grid of image tokens and back.

    Killed, it goes on from the newest checkpoint when run again, and ends with the same bytes. Runs on a GPU where
    there is one, and in several processes with --gpus, or under torchrun or srun, each on its
    part of every batch.

    SIGTERM and SIGUSR1, to any of the processes, have it save at the end of the update in hand and leave with exit
    code 75: run again, it goes on from there. scripts/slurm has the batch files that do so.

    Example: [bold]dalle train-dvae recipes/quickstart.yaml --data runs/quickstart/shapes/train[/bold]
    """
    if starts_processes(gpus):
        return
    leads = speaks()
    settings = read_recipe(recipe, set_, data, wandb)
    source = read_source(settings)

    from dalle_cli.dvae.train import train_dvae
    from dalle_cli.stores.provenance import record_command

    checkpoint = train_dvae(settings, source, out or folders(settings).dvae)
    if leads:
        record_command(checkpoint.path, checkpoint.identity)
        typer.echo(checkpoint.path)
