"""``dalle train-clip``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import (
    DataOption,
    RecipeArgument,
    SetOption,
    TokensOption,
    WandbOption,
    folders,
    read_recipe,
    read_source,
)


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    tokens: TokensOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run and its checkpoints. [RUN/clip]")] = None,
    set_: SetOption = None,
    wandb: WandbOption = None,
) -> None:
    """Train a small CLIP on the same pictures and captions, to rerank samples without any download.

    Killed, it goes on from the newest checkpoint when run again, and ends with the same bytes.

    SIGTERM and SIGUSR1, to any of the processes, have it save at the end of the update in hand and leave with exit
    code 75: run again, it goes on from there. scripts/slurm has the batch files that do so.

    Example: [bold]dalle train-clip recipes/quickstart.yaml --data runs/shapes/train[/bold]
    """
    settings = read_recipe(recipe, set_, data, wandb)
    places = folders(settings)
    source = read_source(settings)

    from dalle_cli.clip.train import train_clip
    from dalle_cli.stores.provenance import record_command

    checkpoint = train_clip(settings, source, tokens or places.tokens, out or places.clip)
    record_command(checkpoint.path, checkpoint.identity)
    typer.echo(checkpoint.path)
