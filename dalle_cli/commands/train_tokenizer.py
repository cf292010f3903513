"""``dalle train-tokenizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.chain import log_next
from dalle_cli.commands.options import (
    DataOption,
    RecipeArgument,
    SetOption,
    changes_of,
    folders,
    read_recipe,
    read_source,
)


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tokenizer.json. [RUN/tokenizer]")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train on the captions of about N samples, spread over the source; 10 million are plenty.",
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Train the BPE tokenizer on the captions of a source.

    Captions are read once and counted by word, so memory grows only with the number of different words.

    Example: [bold]dalle train-tokenizer recipes/quickstart.yaml[/bold]
    """
    from dalle_cli.progress import log
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.text.tokenize import train_tokenizer

    settings = read_recipe(recipe, set_, data)
    tokenizer = train_tokenizer(settings, read_source(settings), out or folders(settings).tokenizer, limit)
    log(f"{tokenizer.name}: {tokenizer.vocab_size} tokens, sha256 {tokenizer.identity[:12]}")
    if tokenizer.vocab_size < (wanted := settings.tokenizer.vocab_size):
        log(
            f"{tokenizer.name}: warning: the captions give only {tokenizer.vocab_size:,} of the {wanted:,} tokens of "
            f"tokenizer.vocab_size; set {tokenizer.vocab_size}, since the prior never learns the others"
        )
    record_command(Path(tokenizer.name), tokenizer.identity)
    typer.echo(tokenizer.name)
    log_next("train-tokenizer", recipe, settings, changes_of(set_, data))
