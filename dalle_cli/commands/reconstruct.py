"""``dalle reconstruct``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.commands.options import CheckpointOption

if TYPE_CHECKING:
    from dalle_cli.dvae.reconstruct import Reconstruction


def command(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, folders, tars, tars by braces, or a mix of them."),
    ],
    dvae: Annotated[Path, typer.Option(help="dVAE checkpoint, or its run.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the PNG files.")],
    size: Annotated[
        int | None, typer.Option(min=8, help="Side that images are cropped to; by default the dVAE's image_size.")
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Write reconstructions without the originals, as eval-fid takes them.")
    ] = False,
    which: CheckpointOption = "best",
) -> None:
    """Write images beside their reconstructions from tokens, and print PSNR and other metrics.

    Into a pipe or a file it prints one JSON object per image; the means, and the names of images that cannot be read,
    go to stderr.

    Example: [bold]dalle reconstruct --dvae runs/quickstart/dvae runs/quickstart/shapes/seen
    --out runs/quickstart/reconstructions[/bold]
    """
    from dataclasses import asdict

    from dalle_cli.dvae.reconstruct import list_images, mean_metrics, reconstruct_images
    from dalle_cli.progress import log, printable_json
    from dalle_cli.stores.checkpoint import open_stage
    from dalle_cli.stores.provenance import record_command

    checkpoint = open_stage(dvae, "dvae", which)
    terminal = sys.stdout.isatty()
    done = []
    for reconstruction in reconstruct_images(checkpoint, list_images(images), out, size, alone=alone):
        done.append(reconstruction)
        if not terminal:
            print(printable_json(asdict(reconstruction)), flush=True)
    means = mean_metrics(done)
    record_command(out)
    if terminal:
        _print_table(done, means, out)
    else:
        log(f"{out}: {len(done)} images, on average " + ", ".join(f"{name} {mean:.5g}" for name, mean in means.items()))


def _print_table(rows: Sequence[Reconstruction], means: dict[str, float], out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dalle_cli.progress import printable

    table = Table(caption=str(out), show_footer=True)
    table.add_column("image", footer=f"mean of {len(rows)}", overflow="fold")
    for name, mean in means.items():
        table.add_column(name.upper(), footer=f"{mean:.5g}", justify="right")
    for row in rows:
        table.add_row(escape(printable(row.key)), *(f"{getattr(row, name):.5g}" for name in means))
    Console().print(table)
