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
    typer.Option("--data", metavar="SOURCE", help="Captioned pictures: folder, tars, manifest, COCO ... [data.train]"),
]
TokensOption = Annotated[
    Path | None, typer.Option("--tokens", metavar="STORE", help="Token store. [RUN/tokens.zarr]", show_default=False)
]

ShardOption = Annotated[
    str,
    typer.Option("--shard", metavar="I/N", help="Make the I-th of N shares, I from 1; [bold]dalle merge[/bold] joins."),
]


def read_recipe(path: Path, overrides: list[str] | None, data: str | None = None) -> Recipe:
    """The recipe with ``--set`` and ``--data`` applied."""
    from dalle_cli.recipes.load import load_recipe

    data_override = [f"data.train={data}"] if data is not None else []
    return load_recipe(path, [*(overrides or []), *data_override])


def recipe_for(source: str, path: Path | None, overrides: list[str] | None) -> Recipe:
    """The recipe at ``path``, or all defaults without one, with ``source`` as its training pictures.

    Raises:
        UserError: overrides of no recipe.
    """
    from dalle_cli.recipes.load import load_recipe
    from dalle_cli.recipes.schema import Recipe

    if path is None and overrides:
        raise UserError(f"--set {overrides[0]}: changes a recipe; give one with --recipe")
    settings = Recipe() if path is None else load_recipe(path, overrides or [])
    return settings.model_copy(update={"data": settings.data.model_copy(update={"train": source})})


def read_source(recipe: Recipe) -> Source:
    """The recipe's source of training pictures, opened; what its index found broken is said on stderr."""
    from dalle_cli.data.exclude import WithoutExcluded
    from dalle_cli.data.sources import open_source
    from dalle_cli.progress import log

    if recipe.data.train is None:
        raise UserError("data.train: the recipe names no pictures; add it, or give --data SOURCE")
    source = open_source(recipe.data.train)
    if recipe.data.exclude is not None:
        source = WithoutExcluded(source, Path(recipe.data.exclude))
    log(source.describe())
    for key, reason in source.skipped[:10]:
        log(f"  left out: {key}: {reason}")
    if len(source.skipped) > 10:
        log(f"  and {len(source.skipped) - 10} more")
    return source


def speaks() -> bool:
    """Whether this process may print its result: false, and its progress silent, beside the first of several.

    Raises:
        UserError: a launcher's environment contradicts itself.
    """
    from dalle_cli.progress import silence
    from dalle_cli.training.launch import read_launch

    leads = read_launch().leads
    if not leads:
        silence()
    return leads


def folders(recipe: Recipe) -> RunFolders:
    """Default places of the recipe's stages."""
    from dalle_cli.recipes.folders import RunFolders

    return RunFolders(Path(recipe.run))
