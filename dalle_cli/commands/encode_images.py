"""``dalle encode-images``."""

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
    dvae: Annotated[Path | None, typer.Option(help="dVAE checkpoint, or its run. [RUN/dvae]")] = None,
    tokens: TokensOption = None,
    set_: SetOption = None,
) -> None:
    """Turn a source's pictures into image tokens, into the token store that its captions are in.

    A picture that cannot be read is skipped and listed with its reason in STORE/skipped-image.jsonl. Killed, it goes
    on at the last committed row when run again.

    Example: [bold]dalle encode-images recipes/quickstart.yaml --data runs/shapes/train[/bold]
    """
    settings = read_recipe(recipe, set_, data)
    places = folders(settings)
    out = tokens or places.tokens

    from dalle_cli.dvae.encode import encode_source
    from dalle_cli.progress import log
    from dalle_cli.stores.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(dvae or places.dvae, "dvae")
    found = encode_source(settings, read_source(settings), checkpoint, out)
    log(f"{out}: {found['rows']} pictures, {found['skipped']} skipped")
    typer.echo(out)
