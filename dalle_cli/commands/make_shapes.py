"""``dalle make-shapes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the splits train, seen and heldout.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Training pictures.")] = 20_000,
    test_n: Annotated[int, typer.Option("--test-n", min=1, help="Pictures of each test split.")] = 500,
    size: Annotated[int, typer.Option(help="Pixels a side, a multiple of 8; of 16 with --panels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Decides every picture.")] = 0,
    panels: Annotated[
        bool, typer.Option("--panels", help="Two panels: below, the shape of the top changed as the caption says.")
    ] = False,
) -> None:
    """Render the built-in world: captioned pictures of coloured shapes, as WebDataset tars.

    Some (colour, shape) pairs appear only in the split [b]heldout[/b], for zero-shot tests; of --panels, on top.

    Example: [bold]dalle make-shapes runs/quickstart/shapes --n 20000[/bold]
    """
    from dalle_cli.progress import progress
    from dalle_cli.shapes.panels import make_panels
    from dalle_cli.shapes.world import make_shapes
    from dalle_cli.stores.provenance import record_command

    with progress("make-shapes", n + 2 * test_n, "pictures") as bar:
        made = 0

        def advance(done: int, _: int) -> None:
            nonlocal made
            bar.advance(done - made)
            made = done

        (make_panels if panels else make_shapes)(out, n, test_n, seed, size, progress=advance)
    record_command(out)
    typer.echo(out)
