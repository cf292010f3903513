"""``dalle merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="The token store that the shares are of.")],
) -> None:
    """Join the shares that --shard left in STORE.parts into STORE, with the same bytes as a run of one process.

    Nothing is copied (the files are hard links), so STORE.parts may be deleted afterwards, and a share may be made
    anew before. Killed, it goes on when run again.

    Example: [bold]for i in 1 2 3 4; do dalle encode-images recipes/quickstart.yaml --shard $i/4 & done; wait;
    dalle merge runs/quickstart/tokens.zarr[/bold]
    """
    from dalle_cli.progress import log
    from dalle_cli.stores.merge import merge_store
    from dalle_cli.stores.provenance import record_command
    from dalle_cli.stores.shards import parts_folder

    found = merge_store(store)
    joined = " and ".join(f"{rows} rows of {part}" for part, rows in found.items())
    log(f"{store}: {joined}; {parts_folder(store)} is no longer needed")
    record_command(store)
    typer.echo(store)
