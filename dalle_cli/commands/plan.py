"""``dalle plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dalle_cli.commands.options import SetOption, read_recipe

if TYPE_CHECKING:
    from dalle_cli.planning.budget import StageTime


def command(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node, with one process each.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpu_memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of a GPU.")] = "16GB",
    interconnect: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Bandwidth of a node's network link, such as 100Gbit.", show_default=False),
    ] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            help="Peak of a GPU in the recipe's precision. \\[monitoring.peak_tflops, or 125, a V100's]",
            show_default=False,
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.3,
    price: Annotated[
        float | None, typer.Option(min=0.0, help="Price of a GPU for an hour.", show_default=False)
    ] = None,
    disk: Annotated[
        str, typer.Option(metavar="SIZE", help="Bytes of a checkpoint that a node writes per second.")
    ] = "1GB",
    pairs: Annotated[
        str | None,
        typer.Option(metavar="COUNT", help="Reckon the data path of so many pairs, such as 250M.", show_default=False),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="With --pairs: number of jobs, each on such a machine.")] = 64,
    table: Annotated[
        bool, typer.Option("--table", help="Print PowerSGD's compression for RECIPE, or for all shipped recipes.")
    ] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Plan for this machine, and time the updates of all stages on it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    set_: SetOption = None,
) -> None:
    """Plan a prior's training on given nodes: memory, traffic, time and cost.

    The plan is computed from the model's shapes; nothing is allocated or run. If the recipe does not fit, the plan
    names settings with which it does. All assumptions are printed.
    With --here, the plan is for this machine, a laptop for example, and has the time of each stage's training, from
    updates that are timed in some seconds.

    With --pairs, the plan is of the steps before the training, from tars to a token store: their time on machines like
    this one, measured in about half a minute, and the files and bytes that they leave.

    Example: [bold]dalle plan recipes/12b.yaml --gpus-per-node 8 --nodes 128 --gpu-memory 16GB --interconnect
    100Gbit[/bold]

    Example: [bold]dalle plan recipes/quickstart.yaml --here[/bold]

    Example: [bold]dalle plan recipes/12b.yaml --pairs 250M --tasks 64[/bold]
    """
    import json
    from dataclasses import asdict

    from dalle_cli.errors import UserError
    from dalle_cli.planning.units import parse_bytes, parse_count, parse_rate

    for option, value, most in (("--peak-tflops", peak_tflops, float("inf")), ("--share", share, 1.0)):
        if value is not None and not 0 < value <= most:
            raise UserError(f"{option} {value:g}: give a number above 0{' and up to 1' if most == 1 else ''}")
    memory = parse_bytes(gpu_memory, "--gpu-memory")
    rate = None if interconnect is None else parse_rate(interconnect, "--interconnect")

    from dalle_cli.planning.cost import assume
    from dalle_cli.planning.memory import Machines
    from dalle_cli.planning.plan import plan
    from dalle_cli.planning.traffic import compression_table
    from dalle_cli.views.plan_tables import render_compression, render_plan

    if table:
        rows = compression_table([recipe] if recipe is not None else None, set_ or [])
        if as_json:
            typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
            return
        from rich.console import Console

        render_compression(rows, Console())
        return
    if recipe is None:
        raise UserError("dalle plan: name a recipe, such as recipes/12b.yaml, or give --table")
    settings = read_recipe(recipe, set_)
    if pairs is not None:
        count = parse_count(pairs, "--pairs")
        from dalle_cli.planning.data_path import plan_data_path
        from dalle_cli.views.plan_tables import render_data_path

        path = plan_data_path(settings, count, tasks)
        if as_json:
            typer.echo(json.dumps(asdict(path), indent=2))
            return
        from rich.console import Console

        render_data_path(path, Console())
        return
    written = float(parse_bytes(disk, "--disk"))
    assumed = assume(settings, peak_tflops, share=share, interconnect=rate, price=price, disk=written)
    times: list[StageTime] = []
    if here:
        from dalle_cli.distributed.launch import read_launch
        from dalle_cli.planning.budget import stage_times
        from dalle_cli.planning.this_machine import this_machine

        found = plan(settings, this_machine(settings, read_launch()), assumed, reckon_time=False)
        times = stage_times(settings, prior_fits=found.memory.fits)
    else:
        found = plan(settings, Machines(gpus_per_node, nodes, memory), assumed)
    if as_json:
        measured = {"here": [asdict(each) for each in times]} if here else {}
        typer.echo(json.dumps(asdict(found) | measured, indent=2))
        return
    from rich.console import Console

    render_plan(found, Console(), measured=times)
