"""``dalle show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dalle_cli.chain import next_line
from dalle_cli.commands.options import SetOption, token_store
from dalle_cli.errors import UserError


def command(
    path: Annotated[
        Any,
        typer.Argument(
            metavar="PATH",
            parser=token_store,
            help="Recipe, run, store, checkpoint or tokenizer; or the address of a token store.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print every setting of a recipe, resolved.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    set_: SetOption = None,
) -> None:
    """Describe a recipe, run, token store, sample store, checkpoint or tokenizer.

    Prints a recipe's main settings and its models' sizes, which stages of a run are done and which one is next, or an
    artifact's contents and the artifacts it belongs to.

    Example: [bold]dalle show recipes/12b.yaml[/bold]
    """
    from dataclasses import asdict, replace

    if schema:
        from dalle_cli.config.json_schema import schema_text

        typer.echo(schema_text(), nl=False)
        return
    if path is None:
        raise UserError("show: name a recipe, run, store, checkpoint or tokenizer, or give --schema")
    if as_yaml:
        if not isinstance(path, Path):
            raise UserError(f"{path}: --yaml prints a recipe, and this is none; leave it out")
        from dalle_cli.config.load import dump_recipe, load_recipe

        typer.echo(dump_recipe(load_recipe(path, set_ or ())), nl=False)
        return

    from dalle_cli.views.describe import describe
    from dalle_cli.views.describe_run import RunDescription

    found = describe(path, set_ or ())
    if isinstance(found, RunDescription) and found.next is not None:
        found = replace(found, line=next_line(path, found.next))
    if as_json:
        from dalle_cli.progress import printable_json

        typer.echo(printable_json(asdict(found), indent=2))
        return
    from rich.console import Console

    from dalle_cli.views.tables import render

    render(found, Console())
