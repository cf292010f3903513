"""The start of a prior's training without the training: what can be wrong is looked at, nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.group import Group
from dalle_cli.distributed.launch import read_launch
from dalle_cli.planning.cost import assume
from dalle_cli.planning.fits_here import this_machine
from dalle_cli.planning.plan import plan
from dalle_cli.prior.train import refuse_unsupported, require_same_sizes
from dalle_cli.stores.checkpoint import steps_in
from dalle_cli.stores.held_out import split_store
from dalle_cli.stores.tokens import TokenReader


def dry_run(recipe: Recipe, store: Path, out: Path) -> dict[str, Any]:
    """The plan for the processes that a launcher started, on this machine, and under ``"start"`` what they begin with.

    Raises:
        UserError: the environment contradicts itself, the recipe wants what is not built or the processes cannot do,
            the store is there but unfinished or of other sizes than the recipe.
    """
    launch = read_launch()
    machines = this_machine(launch)
    device = torch.device("cpu" if machines.on_cpu else "cuda")
    refuse_unsupported(recipe.prior.sharding, recipe.prior.powersgd, Group(launch.rank, launch.size, device))
    found = plan(recipe, machines, assume(recipe))
    steps = steps_in(out) if out.is_dir() else []
    start = {
        "process": launch.rank,
        "processes": launch.size,
        "store": str(store),
        "rows": None,
        "out": str(out),
        "goes_on_from": steps[-1].name if steps else None,
    }
    if store.exists():
        reader = TokenReader(store)
        reader.require_complete()
        require_same_sizes(recipe, reader)
        training, held_out = split_store(reader, recipe)
        start["rows"] = {"training": len(training), "held_out": len(held_out)}
    return {**found, "start": start}
