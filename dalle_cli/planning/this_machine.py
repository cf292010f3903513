"""Training on this machine: check that it fits into memory, and the dry run, which checks a start without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import choose_device, total_memory
from dalle_cli.distributed.group import Group
from dalle_cli.distributed.launch import Launch, read_launch
from dalle_cli.errors import UserError
from dalle_cli.planning.cost import assume
from dalle_cli.planning.fit import Fit, check_fit, suggest_machine, suggest_settings, with_planned_precision
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.plan import Plan, plan
from dalle_cli.prior.counts import count_parameters
from dalle_cli.prior.train import refuse_unsupported, require_same_sizes
from dalle_cli.stores.checkpoint import steps_in
from dalle_cli.stores.held_out import split_store
from dalle_cli.stores.places import Place
from dalle_cli.stores.tokens import TokenReader

GPU_MEMORY = 80_000_000_000
"""Bytes of the GPUs that the error message suggests."""


def this_machine(recipe: Recipe, launch: Launch) -> Machines:
    """Return the nodes of a launch, assumed to be like this machine; ranks without a GPU share its RAM."""
    local = launch.local_size or launch.size
    nodes = -(-launch.size // local)
    device = choose_device(recipe.device)
    if device.type == "cuda":
        device = torch.device("cuda", min(launch.local_rank, torch.cuda.device_count() - 1))
        return Machines(local, nodes, total_memory(device))
    return Machines(local, nodes, total_memory(torch.device("cpu")) // local, on_cpu=True)


def refuse_too_large(recipe: Recipe) -> None:
    """Refuse a recipe whose prior takes more memory to train than this machine has; nothing is allocated.

    Raises:
        UserError: training does not fit; the message suggests settings or a machine that would.
    """
    machines = this_machine(recipe, read_launch())
    given, recipe = recipe, with_planned_precision(recipe, machines)
    counts = count_parameters(recipe)
    fit = check_fit(recipe, counts, machines)
    if fit.peak <= machines.memory:
        return
    where = "in one process" if machines.processes == 1 else f"in each of {machines.processes} processes"
    lines = [
        f"recipe {recipe.name}: training {counts.total / 1e9:.2f}e9 parameters takes {_gb(fit.peak)} of memory "
        f"{where} ({_sizes(fit)}), but only {_gb(machines.memory)} are available"
    ]
    suggestion = suggest_settings(recipe, counts, machines)
    if suggestion.fit.fits and suggestion.machines == machines:
        lines.append(f"it fits here in {_gb(suggestion.fit.peak)} with: {' '.join(suggestion.options())}")
    elif larger := suggest_machine(given, counts, GPU_MEMORY):
        gpus, options = larger.machines.gpus, " ".join(larger.options())
        lines.append(
            f"it fits a machine with {gpus} GPU{'s' if gpus > 1 else ''} of {_gb(GPU_MEMORY)}, taking "
            f"{_gb(larger.fit.peak)} of each, {f'with: {options}' if options else 'with the recipe unchanged'}"
        )
    lines.append("dalle plan computes this for other machines; nothing was allocated or written")
    raise UserError("\n".join(lines))


def _sizes(fit: Fit) -> str:
    parts = [f"{name} {_gb(part.each)}" for name, part in fit.parts.items() if part.place == "device"]
    return ", ".join([*parts, f"activations {_gb(fit.peaks.saved)}"])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


@dataclass(frozen=True)
class Rows:
    """Rows of a token store."""

    training: int
    held_out: int


@dataclass(frozen=True)
class Start:
    """Start of a training run: this rank, its inputs, and the checkpoint to resume from."""

    rank: int
    ranks: int
    store: Place
    rows: Rows | None
    """None if there is no token store yet."""
    out: Path
    resumes_from: str | None
    """Name of the newest checkpoint in ``out``; None if there is none."""


def dry_run(recipe: Recipe, store: Place, out: Path) -> tuple[Plan, Start]:
    """Make the checks of a start of ``dalle train-prior``, and plan it on this machine; nothing is written.

    The token store may be missing.

    Raises:
        UserError: the launcher's environment contradicts itself, the recipe's settings do not work together, or the
            token store is unfinished or was made for other sizes.
    """
    launch = read_launch()
    machines = this_machine(recipe, launch)
    device = torch.device("cpu" if machines.on_cpu else "cuda")
    refuse_unsupported(recipe.prior, Group(launch.rank, launch.size, device, launch.local_size))
    planned = plan(recipe, machines, assume(recipe))
    rows = None
    if (store / "zarr.json").is_file():
        reader = TokenReader(store)
        reader.require_complete()
        require_same_sizes(recipe, reader)
        training, held_out = split_store(reader, recipe, keep=False)
        rows = Rows(len(training), len(held_out))
    steps = steps_in(out) if out.is_dir() else []
    return planned, Start(launch.rank, launch.size, store, rows, out, steps[-1].name if steps else None)
