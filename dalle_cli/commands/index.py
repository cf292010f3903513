"""``dalle index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import ShardOption


def command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Tar shards: a .tar, a folder, a pattern, an address")
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--index",
            envvar="DALLE_INDEX",
            help="Folder for the index files, for shards that lie elsewhere or in folders that may not be written. "
            "\\[beside the shards]",
        ),
    ] = None,
    shard: ShardOption = "1/1",
) -> None:
    """Index tar shards once, so that no later command reads all of their headers again.

    An index file lies beside each shard, or in a folder that later commands find by the environment variable
    DALLE_INDEX. It is made anew when its shard changes. Commands make a missing index themselves and keep it in
    ~/.cache/dalle/index if the shards are large; this command makes it beforehand, in shares if there are many shards.

    Example: [bold]dalle index runs/quickstart/shapes/train[/bold]
    """
    import os

    from dalle_cli.data.formats.shard_index import INDEX, index_folder
    from dalle_cli.data.formats.webdataset import WebDatasetSource, open_indexes
    from dalle_cli.data.open_source import tar_shards
    from dalle_cli.data.remote import is_remote
    from dalle_cli.progress import log
    from dalle_cli.stores.shards import WHOLE, parse_shard

    share, shards = parse_shard(shard), tar_shards(source)
    if folder is not None:
        os.environ[INDEX] = str(folder)
    beside = folder is None and not is_remote(source)
    own = [shards[i] for i in share.rows(len(shards), 1)]
    indexes = open_indexes(own, "beside" if beside else "folder")
    left_out = sum(len(index.left_out) for index in indexes)
    log(f"{source}: {len(own)} shards, {sum(map(len, indexes))} samples, {left_out} members left out")
    if unkept := sum(index.file is None for index in indexes):
        log(f"{source}: the indexes of {unkept} shards are not kept, since their server tells no versions apart")
    if share == WHOLE:
        WebDatasetSource(source, shards)  # which keeps the hash of all keys and sizes
    typer.echo(shards[0].path.parent if beside else index_folder())
