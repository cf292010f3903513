"""``dalle show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.commands.options import SetOption


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Recipe, run, store, checkpoint or tokenizer.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: SetOption = None,
) -> None:
    """Describe a recipe, run, token store, sample store, checkpoint or tokenizer.

    Prints a recipe's main settings and its models' sizes, which stages of a run are done and which one is next, or an
    artifact's contents and the artifacts it belongs to.

    Example: [bold]dalle show recipes/12b.yaml[/bold]
    """
    import json
    from dataclasses import asdict

    from dalle_cli.views.describe import describe

    found = describe(path, set_ or ())
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    from dalle_cli.views.tables import render

    render(found, Console())
