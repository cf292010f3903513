"""``dalle make-shapes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the splits train, seen and heldout.")],
    n: Annotated[int, typer.Option("--n", min=1, max=10**9, help="Number of training pictures.")] = 20_000,
    test_n: Annotated[
        int, typer.Option("--test-n", min=1, max=10**9, help="Number of pictures in each test split.")
    ] = 500,
    size: Annotated[int, typer.Option(help="Side in pixels, a multiple of 8; of 16 with --panels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every picture.")] = 0,
    world: Annotated[
        Literal["lattice", "free"],
        typer.Option(help="lattice: edges on the grid of tokens; free: any place, shaded backgrounds, more words."),
    ] = "lattice",
    panels: Annotated[
        bool,
        typer.Option("--panels", help="Draw two panels: the bottom has the top's shape, changed as the caption says."),
    ] = False,
) -> None:
    """Render the built-in world: captioned pictures of coloured shapes, as WebDataset tars.

    Some (colour, shape) pairs appear only in the split [b]heldout[/b], for zero-shot tests; with --panels this holds
    for the top panel.

    Example: [bold]dalle make-shapes runs/quickstart/shapes --n 20000[/bold]
    """
    from dalle_cli.errors import UserError
    from dalle_cli.shapes.panels import make_panels
    from dalle_cli.shapes.scene import FREE, LATTICE
    from dalle_cli.shapes.world import make_shapes
    from dalle_cli.stores.provenance import record_command

    if panels and world == "free":
        raise UserError("--panels and --world free exclude each other: panels lie on the lattice; drop one of them")
    if panels:
        make_panels(out, n, test_n, seed, size)
    else:
        make_shapes(out, n, test_n, seed, size, kind=FREE if world == "free" else LATTICE)
    record_command(out)
    typer.echo(out)
