"""``dalle train-prior``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import RecipeArgument, SetOption, TokensOption, folders, read_recipe, speaks


def command(
    recipe: RecipeArgument,
    tokens: TokensOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run and its checkpoints. [RUN/prior]")] = None,
    set_: SetOption = None,
) -> None:
    """Train the prior, the sparse transformer that models a caption's image tokens.

    Killed, it goes on from the newest checkpoint when run again, and ends with the same bytes. Runs on a GPU where
    there is one, and in several processes under torchrun, each on its part of every batch.

    Example: [bold]dalle train-prior recipes/quickstart.yaml[/bold]
    """
    leads = speaks()
    settings = read_recipe(recipe, set_)
    places = folders(settings)

    from dalle_cli.prior.train import train_prior

    checkpoint = train_prior(settings, tokens or places.tokens, out or places.prior)
    if leads:
        typer.echo(checkpoint.path)
