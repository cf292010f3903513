"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.errors import UserError

if TYPE_CHECKING:
    from dalle_cli.data.sources import Source
    from dalle_cli.recipes.folders import RunFolders
    from dalle_cli.recipes.schema import Recipe

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="Captioned pictures: folder, tar, tars by braces. [data.train]"),
]
TokensOption = Annotated[
    Path | None, typer.Option("--tokens", metavar="STORE", help="Token store. [RUN/tokens.zarr]", show_default=False)
]


def read_recipe(path: Path, overrides: list[str] | None, data: str | None = None) -> Recipe:
    """The recipe with ``--set`` and ``--data`` applied."""
    from dalle_cli.recipes.load import load_recipe

    data_override = [f"data.train={data}"] if data is not None else []
    return load_recipe(path, [*(overrides or []), *data_override])


def read_source(recipe: Recipe) -> Source:
    """The recipe's source of training pictures, opened; what its index found broken is said on stderr."""
    from dalle_cli.data.sources import open_source
    from dalle_cli.progress import log

    if recipe.data.train is None:
        raise UserError("data.train: the recipe names no pictures; add it, or give --data SOURCE")
    source = open_source(recipe.data.train)
    log(source.describe())
    for key, reason in source.skipped[:10]:
        log(f"  left out: {key}: {reason}")
    if len(source.skipped) > 10:
        log(f"  and {len(source.skipped) - 10} more")
    return source


def folders(recipe: Recipe) -> RunFolders:
    """Default places of the recipe's stages."""
    from dalle_cli.recipes.folders import RunFolders

    return RunFolders(Path(recipe.run))
