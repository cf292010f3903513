"""``dalle train-prior``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.commands.options import (
    GpusOption,
    RecipeArgument,
    SetOption,
    TokensOption,
    WandbOption,
    folders,
    read_recipe,
    speaks,
    starts_processes,
)

if TYPE_CHECKING:
    from dalle_cli.config.schema import Recipe


def command(
    recipe: RecipeArgument,
    tokens: TokensOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run and its checkpoints. [RUN/prior]")] = None,
    set_: SetOption = None,
    gpus: GpusOption = None,
    wandb: WandbOption = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check environment, store and memory, print the plan, write nothing.")
    ] = False,
) -> None:
    """Train the prior, the sparse transformer that models a caption's image tokens.

    Killed, it goes on from the newest checkpoint when run again, and ends with the same bytes. Runs on a GPU where
    there is one, and in several processes with --gpus, or under torchrun, DeepSpeed's launcher or srun, each on its
    part of every batch.

    SIGTERM and SIGUSR1, to any of the processes, have it save at the end of the update in hand and leave with exit
    code 75: run again, it goes on from there. scripts/slurm has the batch files that do so.

    Example: [bold]dalle train-prior recipes/quickstart.yaml[/bold]
    """
    if starts_processes(gpus):
        return
    leads = speaks()
    settings = read_recipe(recipe, set_, wandb=wandb)
    places = folders(settings)
    if dry:
        _dry_run(settings, tokens or places.tokens, out or places.prior, leads)
        return

    from dalle_cli.planning.fits_here import refuse_what_cannot_fit
    from dalle_cli.prior.train import train_prior
    from dalle_cli.stores.provenance import record_command

    refuse_what_cannot_fit(settings)
    checkpoint = train_prior(settings, tokens or places.tokens, out or places.prior)
    if leads:
        record_command(checkpoint.path, checkpoint.identity)
        typer.echo(checkpoint.path)


def _dry_run(settings: Recipe, tokens: Path, out: Path, leads: bool) -> None:
    """Print the plan; then refuse what the real start would refuse."""
    from rich.console import Console

    from dalle_cli.planning.dry_run import dry_run
    from dalle_cli.planning.fits_here import refuse_what_cannot_fit
    from dalle_cli.views.plan_tables import render_plan

    found = dry_run(settings, tokens, out)
    if leads:
        render_plan(found, Console())
    refuse_what_cannot_fit(settings)
