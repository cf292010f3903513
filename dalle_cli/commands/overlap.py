"""``dalle overlap``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import SetOption, read_source, recipe_for


def command(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Captioned pictures: folder, tars, manifest ...")],
    evaluation: Annotated[
        str | None, typer.Argument(metavar="EVAL", help="Others to compare with; TRAIN itself if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the lines, such as duplicates.jsonl; stdout by default.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG file for examples, the least similar first.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps thumbnails (3 kB a picture), to go on and to use again.")
    ] = None,
    similarity: Annotated[float, typer.Option(min=0.5, max=1, help="Of near-duplicates, at least; 1: equal.")] = 0.8,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores by default.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="For data.max_pixels and data.exclude, of TRAIN.")] = None,
    set_: SetOption = None,
) -> None:
    """Find near-duplicates: pictures of TRAIN that are re-encoded, rescaled or slightly cropped copies of one in EVAL.

    Prints a line for each such picture of TRAIN: its key, the key of its nearest match, the distance of their hashes
    in bits, and their similarity. Without EVAL, for each picture of TRAIN that repeats an earlier one. To leave them
    out of training, name the file in the recipe: [bold]data.exclude: duplicates.jsonl[/bold].

    Drawings that differ in a detail or a colour count as near-duplicates: look at --sheet, and raise --similarity.
    With --cache, a killed run goes on, and another EVAL takes no second reading of TRAIN.

    Example: [bold]dalle overlap runs/quickstart/shapes/train runs/quickstart/shapes/seen
    --out runs/quickstart/duplicates.jsonl --sheet runs/quickstart/duplicates.png[/bold]
    """
    import tempfile

    from dalle_cli.data.open_source import open_source
    from dalle_cli.data.overlap.search import find_overlap
    from dalle_cli.data.workers import available_cores
    from dalle_cli.progress import log
    from dalle_cli.stores.files import write_atomically

    settings = recipe_for(train, recipe, set_)
    one, limit = read_source(settings), settings.data.max_pixels
    two = None if evaluation is None else open_source(evaluation)
    with tempfile.TemporaryDirectory(prefix="dalle-overlap-") as passing:
        found = find_overlap(
            one, two, cache or Path(passing), max_pixels=limit, workers=workers or available_cores(), similar=similarity
        )
    log(found.summary())
    if sheet is not None:
        from dalle_cli.views.source_sheets import pairs_sheet

        picture = pairs_sheet(found, limit)
        if picture is None:
            log(f"{sheet}: not written, there is no pair to show")
        else:
            write_atomically(sheet, picture)
    if out is None:
        typer.echo(found.lines(), nl=False)
    else:
        write_atomically(out, found.lines())
        typer.echo(out)
