"""``dalle tokenize-text``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.chain import log_next
from dalle_cli.commands.options import (
    DataOption,
    NewTokensOption,
    RecipeArgument,
    SetOption,
    ShardOption,
    changes_of,
    folders,
    read_recipe,
    read_source,
)


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json or its folder. [RUN/tokenizer]")] = None,
    tokens: NewTokensOption = None,
    shard: ShardOption = "1/1",
    set_: SetOption = None,
) -> None:
    """Encode a source's captions into text tokens, in a Zarr token store.

    All captions of a picture are stored; training draws one of them in each epoch. A picture without a caption is
    skipped and listed with the reason in STORE/skipped-text.jsonl. If it is killed, run it again to resume at the last
    committed row. With --shard 3/8 it makes the third of eight shares of the store, as encode-images does.

    Example: [bold]dalle tokenize-text recipes/quickstart.yaml --data runs/quickstart/shapes/train[/bold]
    """
    from dalle_cli.data.captions import MOST_CAPTIONS
    from dalle_cli.progress import log
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.stores.shards import parse_shard
    from dalle_cli.text.bpe import Tokenizer
    from dalle_cli.text.tokenize import tokenize_source

    share = parse_shard(shard)
    settings = read_recipe(recipe, set_, data)
    places, source = folders(settings), read_source(settings)
    words = Tokenizer.load(tokenizer or places.tokenizer)
    made = tokenize_source(settings, source, words, tokens or places.tokens, share)
    limit, done = settings.tokenizer.text_length, {"truncate": "cut", "refuse": "refused"}[settings.tokenizer.overlong]
    log(
        f"{made.path}: {made.rows} pictures, {made.captions} captions, {made.skipped} pictures skipped, "
        f"{made.overlong} captions of more than {limit} tokens {done}"
    )
    if made.left_out:
        log(f"{made.path}: {made.left_out} captions left out, beyond the first {MOST_CAPTIONS} of their pictures")
    record_command(made.path)
    typer.echo(made.path)
    log_next("tokenize-text", recipe, settings, changes_of(set_, data))
