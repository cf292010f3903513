"""``dalle import-dvae``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    encoder: Annotated[Path, typer.Argument(metavar="ENCODER", help="encoder.pkl, as OpenAI published it.")],
    decoder: Annotated[Path, typer.Argument(metavar="DECODER", help="decoder.pkl, as OpenAI published it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the checkpoint to write.")],
    image_size: Annotated[int, typer.Option(min=8, help="Side of the images to encode, a multiple of 8.")] = 256,
) -> None:
    """Convert OpenAI's released dVAE into a checkpoint for encode-images, reconstruct and sample.

    The pickles are read as data: nothing in them is executed, and a file with other classes than the dVAE's is refused.

    Example: [bold]dalle import-dvae encoder.pkl decoder.pkl runs/quickstart/openai-dvae[/bold]
    """
    from dalle_cli.dvae.openai import import_dvae
    from dalle_cli.stores.provenance import record_command

    checkpoint = import_dvae(encoder, decoder, out, image_size)
    record_command(checkpoint.path, checkpoint.identity)
    typer.echo(checkpoint.path)
