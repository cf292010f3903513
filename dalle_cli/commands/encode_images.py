"""``dalle encode-images``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.chain import log_next
from dalle_cli.commands.options import (
    CheckpointOption,
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
    dvae: Annotated[Path | None, typer.Option(help="dVAE checkpoint, or its run. [RUN/dvae]")] = None,
    tokens: NewTokensOption = None,
    which: CheckpointOption = "best",
    shard: ShardOption = "1/1",
    set_: SetOption = None,
) -> None:
    """Encode a source's pictures into image tokens, in the token store that has its captions.

    A picture that cannot be read is skipped and listed with the reason in STORE/skipped-image.jsonl. If it is killed,
    run it again to resume at the last committed row. On a GPU, set the number of processes that decode pictures to the
    number of free cores: --set dvae.training.workers=16.

    With --shard 3/8 the command makes the third of eight shares of the store. Independent jobs, such as a Slurm array's
    (--shard $SLURM_ARRAY_TASK_ID/8), make the others in any order or at the same time; the store is complete when all
    shares are.

    Example: [bold]dalle encode-images recipes/quickstart.yaml --data runs/quickstart/shapes/train[/bold]
    """
    settings = read_recipe(recipe, set_, data)
    places = folders(settings)
    out = tokens or places.tokens

    from dalle_cli.progress import log
    from dalle_cli.stores.checkpoint import open_stage
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.stores.shards import parse_shard

    share = parse_shard(shard)
    checkpoint = open_stage(dvae or places.dvae, "dvae", which)
    source = read_source(settings)

    from dalle_cli.dvae.encode import encode_source

    found = encode_source(settings, source, checkpoint, out, share)
    log(f"{out}: {found.rows} pictures, {found.skipped} skipped")
    record_command(out)
    typer.echo(out)
    log_next("encode-images", recipe, settings, changes_of(set_, data))
