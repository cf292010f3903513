"""``dalle train-dvae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.chain import log_next
from dalle_cli.commands.options import (
    DataOption,
    ExtendOption,
    GpusOption,
    RecipeArgument,
    SetOption,
    WandbOption,
    changes_of,
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
    extend: ExtendOption = None,
    gpus: GpusOption = None,
    wandb: WandbOption = None,
) -> None:
    """Train the discrete VAE, which turns an image into a grid of tokens and back.

    If it is killed, run it again: it resumes from the newest checkpoint and ends with the same bytes. It uses a GPU if
    there is one. --gpus, torchrun or srun start several processes, each of which trains on its part of every batch.

    On SIGTERM or SIGUSR1 to any process, it saves a checkpoint after the current update and exits with code 75. Run it
    again to resume; the batch files in scripts/slurm do this.

    Example: [bold]dalle train-dvae recipes/quickstart.yaml --data runs/quickstart/shapes/train[/bold]
    """
    if starts_processes(gpus):
        return
    leads = speaks()
    settings = read_recipe(recipe, set_, data, wandb)
    source = read_source(settings)

    from dalle_cli.dvae.train import train_dvae
    from dalle_cli.stores.provenance import record_command

    checkpoint = train_dvae(settings, source, out or folders(settings).dvae, extend)
    if leads:
        record_command(checkpoint.path, checkpoint.identity)
        typer.echo(checkpoint.path)
        log_next("train-dvae", recipe, settings, changes_of(set_, data))
