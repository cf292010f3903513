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
) -> None:
    """Train a small CLIP on the same pictures and captions, to rerank samples without any download.

    Killed, it goes on from the newest checkpoint when run again, and ends with the same bytes.

    Example: [bold]dalle train-clip recipes/quickstart.yaml --data runs/shapes/train[/bold]
    """
    settings = read_recipe(recipe, set_, data)
    places = folders(settings)
    source = read_source(settings)

    from dalle_cli.clip.train import train_clip

    typer.echo(train_clip(settings, source, tokens or places.tokens, out or places.clip).path)
