"""``dalle tokenize-text``."""

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
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or its folder. [RUN/tokenizer]")] = None,
    tokens: TokensOption = None,
    set_: SetOption = None,
) -> None:
    """Turn a source's captions into text tokens, into a Zarr token store.

    Killed, it goes on at the last committed row when run again.

    Example: [bold]dalle tokenize-text recipes/quickstart.yaml --data runs/shapes/train[/bold]
    """
    from dalle_cli.progress import log
    from dalle_cli.text.bpe import Tokenizer
    from dalle_cli.text.tokenize import tokenize_source

    settings = read_recipe(recipe, set_, data)
    places = folders(settings)
    out = tokens or places.tokens
    found = tokenize_source(settings, read_source(settings), Tokenizer.load(tokenizer or places.tokenizer), out)
    log(f"{out}: {found['rows']} captions, {found['skipped']} skipped")
    typer.echo(out)
