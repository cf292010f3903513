"""Arguments and options that several commands share, and the class of all commands."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from typer.core import TyperCommand

from dalle_cli.errors import UserError

if TYPE_CHECKING:
    from dalle_cli.config.run_folders import RunFolders
    from dalle_cli.config.schema import Recipe
    from dalle_cli.data.source import Source
    from dalle_cli.stores.places import Place


LARGEST = 2**53
"""Largest number that is taken for an option; all numbers up to it are exact in JSON and in 64-bit floats."""


class Command(TyperCommand):
    """A command with the usual usage line (``RECIPE``, ``[EVAL]``, ``[PROMPT]...``), without Typer's braces."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        pieces = [self.options_metavar or ""]
        for argument in self.params:
            if argument.param_type_name == "argument":
                name = (argument.metavar or argument.name or "").removesuffix("...")
                if " " not in name:  # a metavar of several words marks its optional words itself
                    name = (name if argument.required else f"[{name}]") + ("..." if argument.nargs != 1 else "")
                pieces.append(name)
        return pieces

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the arguments, and refuse numbers that no option means: bounds let NaN pass, and often infinity."""
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            value, mistake = ctx.params.get(parameter.name or ""), ""
            if isinstance(value, float) and not math.isfinite(value):
                mistake = f"{value} is no finite number."
            elif isinstance(value, int) and abs(value) > LARGEST:
                mistake = f"{value} is above {LARGEST}."
            if mistake:
                raise typer.BadParameter(mistake, ctx=ctx, param=cast(Any, parameter))
        return rest


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe: a YAML file, or the name of a shipped one.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="SOURCE", help="Captioned pictures: a folder, tars, a manifest, COCO ... \\[data.train]"
    ),
]


def token_store(given: str) -> Place:
    """Return the token store that ``--tokens`` names, by a path or an address."""
    from dalle_cli.data.remote import is_remote

    if not is_remote(given):
        return Path(given)
    from dalle_cli.data.remote_place import AddressOfStore

    return AddressOfStore(given.rstrip("/"))


def new_token_store(given: str) -> Path:
    """Return the token store that ``--tokens`` names, for a command that writes it.

    Raises:
        UserError: it is on a server.
    """
    from dalle_cli.data.remote import is_remote

    if is_remote(given):
        raise UserError(f"--tokens {given}: a token store is written on this machine; name a folder, and copy it there")
    return Path(given)


NewTokensOption = Annotated[
    Path | None,
    typer.Option(
        "--tokens",
        metavar="STORE",
        parser=new_token_store,
        help="Token store to fill. [RUN/tokens.zarr]",
        show_default=False,
    ),
]
TokensOption = Annotated[
    Any,
    typer.Option(
        "--tokens",
        metavar="STORE",
        parser=token_store,
        help="Token store, here or at s3://, gs://, az:// or https://. [RUN/tokens.zarr]",
        show_default=False,
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        min=1,
        max=1024,
        show_default=False,
        help="Start N processes on this machine, one per GPU, or sharing its cores if it has none. \\[one process]",
    ),
]
ExtendOption = Annotated[
    int | None,
    typer.Option(
        "--extend",
        metavar="N",
        min=1,
        max=10**12,
        show_default=False,
        help="Train a finished run for N more updates; the learning rate runs through its schedule once more.",
    ),
]
CheckpointOption = Annotated[
    Literal["best", "last"],
    typer.Option("--checkpoint", help="Take the checkpoint of a run's best validation, or its newest one."),
]
ShardOption = Annotated[
    str,
    typer.Option("--shard", metavar="I/N", help="Make the I-th of N shares; I is at least 1."),
]

WandbOption = Annotated[
    str | None,
    typer.Option(
        metavar="PROJECT", help="Weights & Biases project to log to. \\[monitoring.wandb]", show_default=False
    ),
]


def read_recipe(path: Path, overrides: list[str] | None, data: str | None = None, wandb: str | None = None) -> Recipe:
    """Return the recipe with ``--set``, ``--data`` and ``--wandb`` applied."""
    import json

    from dalle_cli.config.load import load_recipe

    wandb_override = [f"monitoring.wandb={json.dumps(wandb)}"] if wandb is not None else []
    return load_recipe(path, [*changes_of(overrides, data), *wandb_override])


def changes_of(overrides: list[str] | None, data: str | None) -> list[str]:
    """Return what ``--set`` and ``--data`` change, as KEY=VALUE."""
    return [*(overrides or []), *([f"data.train={data}"] if data is not None else [])]


def recipe_for(source: str, path: Path | None, overrides: list[str] | None) -> Recipe:
    """Return the recipe at ``path``, or the default recipe, with ``source`` as its training pictures.

    Raises:
        UserError: there are overrides but no recipe.
    """
    from dalle_cli.config.load import load_recipe
    from dalle_cli.config.schema import Recipe

    if path is None and overrides:
        raise UserError(f"--set {overrides[0]}: changes a recipe; give one with --recipe")
    settings = Recipe() if path is None else load_recipe(path, overrides or [])
    return settings.model_copy(
        update={"data": settings.data.model_copy(update={"train": source, "weights": None, "validation": None})}
    )


def read_source(recipe: Recipe) -> Source:
    """Open the recipe's source of training pictures, and log the samples left out.

    Raises:
        UserError: the recipe names no source, or it cannot be read.
    """
    from dalle_cli.data.exclude import SourceWithExclusions
    from dalle_cli.data.open_source import open_sources
    from dalle_cli.progress import log

    if recipe.data.train is None:
        raise UserError("data.train: the recipe names no pictures; set it, or give --data SOURCE")
    source = open_sources(recipe.data.sources)
    if recipe.data.exclude is not None:
        source = SourceWithExclusions(source, Path(recipe.data.exclude))
    log(source.describe())
    for key, reason in source.skipped[:10]:
        log(f"  left out: {key}: {reason}")
    if len(source.skipped) > 10:
        log(f"  and {len(source.skipped) - 10} more")
    return source


def starts_processes(gpus: int | None) -> bool:
    """Run this command in ``gpus`` new processes, unless None; return whether it did.

    Raises:
        UserError: a launcher already started this process, or one of the processes failed.
    """
    if gpus is None:
        return False
    from dalle_cli.distributed.spawn import has_launcher, start_processes

    if has_launcher():
        raise UserError("--gpus starts processes, but a launcher started this one; drop one of the two")
    start_processes(gpus, _without_gpus(sys.argv[1:]))
    return True


def _without_gpus(arguments: list[str]) -> list[str]:
    rest, words = [], iter(arguments)
    for word in words:
        if word == "--gpus":
            next(words, None)
        elif not word.startswith("--gpus="):
            rest.append(word)
    return rest


def speaks() -> bool:
    """Return whether this is the first rank, which prints the results; silence the progress of other ranks.

    Raises:
        UserError: the launcher's environment contradicts itself.
    """
    from dalle_cli.distributed.launch import read_launch
    from dalle_cli.progress import silence

    leads = read_launch().leads
    if not leads:
        silence()
    return leads


def folders(recipe: Recipe) -> RunFolders:
    """Return the default folders of the recipe's stages."""
    from dalle_cli.config.run_folders import RunFolders

    return RunFolders(Path(recipe.run))


def require_clip(clip: str | None, pretrained: str | None) -> None:
    """Raise UserError if ``--pretrained`` is given without the ``--clip`` that it belongs to."""
    if pretrained is not None and clip is None:
        raise UserError("--pretrained needs --clip with the open_clip model's name, such as ViT-B-32")


def named_systems(given: list[str], metavar: str, example: str) -> dict[str, str]:
    """Parse values of ``--system``, such as ``ours=ranked.jsonl``, into a path for each system's name.

    ``metavar`` and ``example`` show the form of a value in the error message.

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
