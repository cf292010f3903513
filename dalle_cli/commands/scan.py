"""``dalle scan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import SetOption, ShardOption, read_source, recipe_for
from dalle_cli.errors import UserError


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Captioned pictures: folder, tars, manifest ...")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose data.filters are tried.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for scan.json and a sheet of 25 examples.")
    ] = None,
    languages: Annotated[bool, typer.Option("--languages", help="Guess each caption's language.")] = False,
    shard: ShardOption = "1/1",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read; one per core by default.")] = None,
    set_: SetOption = None,
) -> None:
    """Check a source before training: sizes, captions, broken files, and the samples that each filter would drop.

    Every picture is decoded. Each filter is tried by itself, at the recipe's limit in [bold]data.filters[/bold], or at
    a typical limit if it is off. Jobs of [bold]--shard[/bold] count their shares of a large source into the same
    [bold]--out[/bold], and the last of them adds up all.

    Example: [bold]dalle scan runs/quickstart/shapes/train --recipe recipes/own-data.yaml
    --out runs/quickstart/scan[/bold]
    """
    from dataclasses import asdict

    from dalle_cli.data.language import LanguageDetector
    from dalle_cli.data.scan import scan
    from dalle_cli.data.workers import available_cores
    from dalle_cli.progress import printable_json
    from dalle_cli.stores.shards import WHOLE, parse_shard

    share = parse_shard(shard)
    if share != WHOLE and out is None:
        raise UserError("--shard needs --out, the folder where the shares meet")
    settings = recipe_for(source, recipe, set_)
    detector = LanguageDetector() if languages else None
    opened, processes = read_source(settings), workers or available_cores()
    if share == WHOLE or out is None:
        found = scan(opened, settings.data, settings.image_size, workers=processes, detector=detector)
    else:
        from dalle_cli.data.scan_shares import scan_share

        of_all = scan_share(opened, settings.data, settings.image_size, share, out / "shares", processes, detector)
        if of_all is None:
            return
        found = of_all
    if out is not None:
        from dalle_cli.stores.files import write_atomically, write_json
        from dalle_cli.views.source_sheets import examples_sheet

        write_json(out / "scan.json", asdict(found))
        sheet = examples_sheet(opened, settings.data.max_pixels)
        if sheet is not None:
            write_atomically(out / "examples.png", sheet)
    if as_json:
        typer.echo(printable_json(asdict(found), indent=2))
        return
    from rich.console import Console

    from dalle_cli.views.tables import render_scan

    render_scan(found, Console(stderr=out is not None))
    if out is not None:
        typer.echo(out)
