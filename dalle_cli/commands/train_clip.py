"""``dalle train-clip``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.chain import log_next
from dalle_cli.commands.options import (
    DataOption,
    ExtendOption,
    RecipeArgument,
    SetOption,
    TokensOption,
    WandbOption,
    changes_of,
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
    extend: ExtendOption = None,
    wandb: WandbOption = None,
) -> None:
    """Train a small CLIP on the prior's pictures and captions, to rerank samples without a download.

    If it is killed, run it again: it resumes from the newest checkpoint and ends with the same bytes. On SIGTERM or
    SIGUSR1 it saves a checkpoint after the current update and exits with code 75.

    Example: [bold]dalle train-clip recipes/quickstart.yaml[/bold]
    """
    settings = read_recipe(recipe, set_, data, wandb)
    places = folders(settings)
    source = read_source(settings)

    from dalle_cli.clip.train import train_clip
    from dalle_cli.stores.provenance import record_command

    checkpoint = train_clip(settings, source, tokens or places.tokens, out or places.clip, extend)
    record_command(checkpoint.path, checkpoint.identity)
    typer.echo(checkpoint.path)
    log_next("train-clip", recipe, settings, changes_of(set_, data))
