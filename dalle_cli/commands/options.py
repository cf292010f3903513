"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.errors import UserError

if TYPE_CHECKING:
    from dalle_cli.config.run_folders import RunFolders
    from dalle_cli.config.schema import Recipe
    from dalle_cli.data.source import Source

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SOURCE", help="Captioned pictures: folder, tars, manifest, COCO ... \\[data.train]"
    ),
]
TokensOption = Annotated[
    Path | None, typer.Option("--tokens", metavar="STORE", help="Token store. [RUN/tokens.zarr]", show_default=False)
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        min=1,
        show_default=False,
        help="Start N processes on this machine, a GPU each; where it has none they share its cores. \\[one process]",
    ),
]
ShardOption = Annotated[
    str,
    typer.Option("--shard", metavar="I/N", help="Make the I-th of N shares of the store, I from 1."),
]

WandbOption = Annotated[
    str | None,
    typer.Option(
        metavar="PROJECT", help="Show the run in Weights & Biases too. \\[monitoring.wandb]", show_default=False
    ),
]


def read_recipe(path: Path, overrides: list[str] | None, data: str | None = None, wandb: str | None = None) -> Recipe:
    """The recipe with ``--set``, ``--data`` and ``--wandb`` applied."""
    import json

    from dalle_cli.config.load import load_recipe

    data_override = [f"data.train={data}"] if data is not None else []
    wandb_override = [f"monitoring.wandb={json.dumps(wandb)}"] if wandb is not None else []
    return load_recipe(path, [*(overrides or []), *data_override, *wandb_override])


def recipe_for(source: str, path: Path | None, overrides: list[str] | None) -> Recipe:
    """The recipe at ``path``, or all defaults without one, with ``source`` as its training pictures.

    Raises:
        UserError: overrides of no recipe.
    """
    from dalle_cli.config.load import load_recipe
    from dalle_cli.config.schema import Recipe

    if path is None and overrides:
        raise UserError(f"--set {overrides[0]}: changes a recipe; give one with --recipe")
    settings = Recipe() if path is None else load_recipe(path, overrides or [])
    return settings.model_copy(update={"data": settings.data.model_copy(update={"train": source})})


def read_source(recipe: Recipe) -> Source:
    """The recipe's source of training pictures, opened; what its index found broken is said on stderr."""
    from dalle_cli.data.exclude import SourceWithExclusions
    from dalle_cli.data.open_source import open_source
    from dalle_cli.progress import log

    if recipe.data.train is None:
        raise UserError("data.train: the recipe names no pictures; add it, or give --data SOURCE")
    source = open_source(recipe.data.train)
    if recipe.data.exclude is not None:
        source = SourceWithExclusions(source, Path(recipe.data.exclude))
    log(source.describe())
    for key, reason in source.skipped[:10]:
        log(f"  left out: {key}: {reason}")
    if len(source.skipped) > 10:
        log(f"  and {len(source.skipped) - 10} more")
    return source


def starts_processes(gpus: int | None) -> bool:
    """Run this very command in ``gpus`` processes, if a number is given; whether that was done.

    Raises:
        UserError: a launcher started this process already, or one of the processes failed.
    """
    if gpus is None:
        return False
    from dalle_cli.distributed.spawn import has_launcher, start_processes

    if has_launcher():
        raise UserError("--gpus starts processes, but a launcher started this one: give up one of the two")
    start_processes(gpus, _without_gpus(sys.argv[1:]))
    return True


def _without_gpus(arguments: list[str]) -> list[str]:
    kept, words = [], iter(arguments)
    for word in words:
        if word == "--gpus":
            next(words, None)
        elif not word.startswith("--gpus="):
            kept.append(word)
    return kept


def speaks() -> bool:
    """Whether this process may print its result: false, and its progress silent, beside the first of several.

    Raises:
        UserError: a launcher's environment contradicts itself.
    """
    from dalle_cli.distributed.launch import read_launch
    from dalle_cli.progress import silence

    leads = read_launch().leads
    if not leads:
        silence()
    return leads


def folders(recipe: Recipe) -> RunFolders:
    """Default places of the recipe's stages."""
    from dalle_cli.config.run_folders import RunFolders

    return RunFolders(Path(recipe.run))


def named_systems(given: list[str], metavar: str, example: str) -> dict[str, str]:
    """Parse the values of ``--system``, such as ``ours=ranked.jsonl``, into where each system's pictures are by name.

    Args:
        given: The values as typed.
        metavar: The form of a value as the help shows it, for the error message.
        example: A correct value, for the error message.

    Raises:
        UserError: a value lacks its name or its right side, or two have the same name.
    """
    systems: dict[str, str] = {}
    for value in given:
        name, _, spec = value.partition("=")
        if not name.strip() or not spec.strip():
            raise UserError(f"--system {value}: is not {metavar}; write e.g. --system {example}")
        if name in systems:
            raise UserError(f"--system {value}: the name {name} is given twice; name the systems differently")
        systems[name] = spec
    return systems
