"""``dalle reconstruct``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    pictures: Annotated[
        list[str],
        typer.Argument(metavar="PICTURE...", help="Picture files, folders, tars, tars by braces: all of them."),
    ],
    dvae: Annotated[Path, typer.Option(help="dVAE checkpoint, or its run.")],
    out: Annotated[Path, typer.Option(help="Folder of the PNG files.")],
    size: Annotated[
        int | None, typer.Option(min=8, help="Side that pictures are cut to; the dVAE's image_size if left out.")
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Write reconstructions without the originals, as eval-fid takes them.")
    ] = False,
) -> None:
    """See what a dVAE keeps of pictures: each beside its reconstruction from tokens, and how far they differ.

    Into a pipe or file it prints one JSON object a picture; the means go to stderr. A picture that cannot be read is
    passed over and named there.

    Example: [bold]dalle reconstruct --dvae runs/quickstart/dvae runs/quickstart/shapes/seen
    --out runs/quickstart/reconstructions[/bold]
    """
    import json

    from dalle_cli.dvae.reconstruct import list_pictures, mean_figures, reconstruct_pictures
    from dalle_cli.progress import log
    from dalle_cli.stores.checkpoint import open_checkpoint
    from dalle_cli.stores.provenance import record_command

    checkpoint = open_checkpoint(dvae, "dvae")
    terminal = sys.stdout.isatty()
    done = []
    for figures in reconstruct_pictures(checkpoint, list_pictures(pictures), out, size, alone=alone):
        done.append(figures)
        if not terminal:
            print(json.dumps(figures, ensure_ascii=False), flush=True)
    means = mean_figures(done)
    record_command(out)
    if terminal:
        _table(done, means, out)
    else:
        log(f"{out}: {len(done)} pictures, on average " + ", ".join(f"{name} {means[name]:.5g}" for name in means))


def _table(rows: list[dict[str, Any]], means: dict[str, float], out: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption=str(out), show_footer=True)
    table.add_column("picture", footer=f"mean of {len(rows)}", overflow="fold")
    for name, mean in means.items():
        table.add_column(name.upper(), footer=f"{mean:.5g}", justify="right")
    for row in rows:
        table.add_row(escape(row["key"]), *(f"{row[name]:.5g}" for name in means))
    Console().print(table)
