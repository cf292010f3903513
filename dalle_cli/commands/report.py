"""``dalle report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import RecipeArgument, SetOption, folders, read_recipe


def command(
    recipe: RecipeArgument,
    ranked: Annotated[Path | None, typer.Option(help="Lines of dalle rerank, all samples of each caption.")] = None,
    fid: Annotated[list[Path] | None, typer.Option(help="JSON file of dalle eval-fid --out; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. [RUN]")] = None,
    set_: SetOption = None,
) -> None:
    """Write a run's report: one HTML file that opens from disk, its figures as JSON, and a contact sheet.

    Stages that have not run are named in it. Captions of the built-in shapes world are checked on the pictures.

    Example: [bold]dalle report recipes/quickstart.yaml --ranked runs/quickstart/ranked.jsonl[/bold]
    """
    settings = read_recipe(recipe, set_)

    from rich.console import Console

    from dalle_cli.report.report import write_report
    from dalle_cli.views.tables import render_report

    report = write_report(settings, ranked, fid or [], out or folders(settings).root)
    render_report(report.figures, Console(stderr=True))
    typer.echo(report.html)
