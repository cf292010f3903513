"""``dalle export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import CheckpointOption
from dalle_cli.planning.units import parse_bytes


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run's folder.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A new folder. [CKPT/../exported]", show_default=False)
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Maximum size of a file, such as 5GB. \\[one file]")
    ] = None,
    which: CheckpointOption = "best",
) -> None:
    """Export a checkpoint's EMA weights alone, in safetensors, to a new checkpoint to sample from.

    Checkpoints of any ZeRO stage and number of processes can be exported. Sampling from the training run works too.

    Example: [bold]dalle export runs/quickstart/prior runs/quickstart/export --shard-size 10MB[/bold]
    """
    largest = None if shard_size is None else parse_bytes(shard_size, "--shard-size")

    from dalle_cli.stores.checkpoint import open_checkpoint
    from dalle_cli.stores.export import export_checkpoint

    found = open_checkpoint(checkpoint, which=which)
    typer.echo(export_checkpoint(found, out or found.path.parent / "exported", largest).path)
