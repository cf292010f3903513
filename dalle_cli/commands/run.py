"""``dalle run``."""

from __future__ import annotations

from typing import Annotated

import typer

from dalle_cli.chain import HELD_OUT_CAPTIONS, STAGE_NAMES, StageName, run_stages, stages_of
from dalle_cli.commands.options import DataOption, GpusOption, RecipeArgument, SetOption, changes_of, read_recipe
from dalle_cli.errors import UserError


def command(
    recipe: RecipeArgument,
    data: DataOption = None,
    first: Annotated[StageName, typer.Option("--from", help="First stage to run.")] = "train-tokenizer",
    last: Annotated[StageName, typer.Option("--until", help="Last stage to run.")] = "report",
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, help="Number of held-out captions to draw.")
    ] = HELD_OUT_CAPTIONS,
    set_: SetOption = None,
    gpus: GpusOption = None,
) -> None:
    """Run the whole chain of a recipe, from captioned pictures to the report of its samples.

    Stages that are done are skipped. If it is killed, run it again: it goes on where it stopped and ends with the same
    bytes as the stages' own commands, which it prints. On SIGTERM or SIGUSR1 the stage that trains saves a checkpoint,
    and it exits with code 75.

    Example: [bold]dalle run recipes/quickstart.yaml --until train-clip[/bold]
    """
    settings = read_recipe(recipe, set_, data)
    begin, end = STAGE_NAMES.index(first), STAGE_NAMES.index(last)
    if begin > end:
        raise UserError(f"--from {first} comes after --until {last}; the stages are {', '.join(STAGE_NAMES)}")
    if begin <= STAGE_NAMES.index("sample") <= end and not settings.data.holds_out:
        raise UserError(
            "data.holdout is 0, so there are no held-out captions to draw; set it to 0.02, or stop with "
            "--until train-clip"
        )
    run_stages(stages_of(recipe, settings, changes_of(set_, data), limit, gpus)[begin : end + 1])
