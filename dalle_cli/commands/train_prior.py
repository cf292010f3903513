"""``dalle train-prior``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.chain import log_next
from dalle_cli.commands.options import (
    DataOption,
    ExtendOption,
    GpusOption,
    RecipeArgument,
    SetOption,
    TokensOption,
    WandbOption,
    changes_of,
    folders,
    read_recipe,
    speaks,
    starts_processes,
)

if TYPE_CHECKING:
    from dalle_cli.config.schema import Recipe
    from dalle_cli.stores.places import Place


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    tokens: TokensOption = None,
    dvae: Annotated[
        Path | None,
        typer.Option(
            help="dVAE that encoded the store, or its run, for [b]prior.image_embedding: codebook[/b]. [RUN/dvae]"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run and its checkpoints. [RUN/prior]")] = None,
    set_: SetOption = None,
    extend: ExtendOption = None,
    gpus: GpusOption = None,
    wandb: WandbOption = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check environment, store and memory, and print the plan; write nothing.")
    ] = False,
) -> None:
    """Train the prior, the sparse transformer that models a caption and its image tokens.

    If it is killed, run it again: it resumes from the newest checkpoint and ends with the same bytes. It uses a GPU if
    there is one. --gpus, torchrun or srun start several processes, each of which trains on its part of every batch.

    On SIGTERM or SIGUSR1 to any process, it saves a checkpoint after the current update and exits with code 75. Run it
    again to resume; the batch files in scripts/slurm do this.

    Example: [bold]dalle train-prior recipes/quickstart.yaml[/bold]
    """
    if starts_processes(gpus):
        return
    leads = speaks()
    settings = read_recipe(recipe, set_, data, wandb)
    places = folders(settings)
    if dry:
        _dry_run(settings, tokens or places.tokens, out or places.prior, leads)
        return

    from dalle_cli.planning.this_machine import refuse_too_large
    from dalle_cli.prior.train import train_prior
    from dalle_cli.sampling.drawings import held_out_drawing
    from dalle_cli.stores.provenance import record_command

    refuse_too_large(settings)
    store = tokens or places.tokens
    drawing = held_out_drawing(settings, store, dvae or places.dvae) if leads else None
    checkpoint = train_prior(settings, store, out or places.prior, dvae, extend, drawing)
    if leads:
        record_command(checkpoint.path, checkpoint.identity)
        typer.echo(checkpoint.path)
        log_next("train-prior", recipe, settings, changes_of(set_, data))


def _dry_run(settings: Recipe, tokens: Place, out: Path, leads: bool) -> None:
    """Print the plan, then raise the error of a start that does not fit into memory."""
    from rich.console import Console

    from dalle_cli.planning.this_machine import dry_run, refuse_too_large
    from dalle_cli.views.plan_tables import render_plan

    plan, start = dry_run(settings, tokens, out)
    if leads:
        render_plan(plan, Console(), start)
    refuse_too_large(settings)
