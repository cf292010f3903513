"""Whether a prior's training can fit the machine that it is started on."""

from __future__ import annotations

import torch

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import total_memory
from dalle_cli.distributed.launch import Launch, read_launch
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.plan import Fit, fit, mend, would_fit
from dalle_cli.prior.counts import count_parameters

GPU_MEMORY = 80_000_000_000
"""Of the GPUs that a refusal speaks of."""


def this_machine(launch: Launch) -> Machines:
    """The processes of ``launch`` with the memory of this machine: a GPU each, or its share of the RAM."""
    local = launch.local_size or launch.size
    nodes = -(-launch.size // local)
    if torch.cuda.is_available():
        device = torch.device("cuda", min(launch.local_rank, torch.cuda.device_count() - 1))
        return Machines(local, nodes, total_memory(device))
    return Machines(local, nodes, total_memory(torch.device("cpu")) // local, on_cpu=True)


def refuse_what_cannot_fit(recipe: Recipe) -> None:
    """Refuse a prior whose training needs more memory than there is. Nothing is allocated for it.

    Raises:
        UserError: with the plan's figures, and what would fit.
    """
    machines = this_machine(read_launch())
    counts = count_parameters(recipe)
    found = fit(recipe, counts, machines)
    if found.peak <= machines.memory:
        return
    where = "in one process" if machines.world == 1 else f"in each of {machines.world} processes"
    lines = [
        f"recipe {recipe.name}: training {counts.total / 1e9:.2f}e9 parameters takes {_gb(found.peak)} of memory "
        f"{where} ({_figures(found)}); there are {_gb(machines.memory)}"
    ]
    mended = mend(recipe, counts, machines)
    if mended.fit.fits and mended.machines == machines:
        lines.append(f"here would fit, with {_gb(mended.fit.peak)}: {' '.join(mended.options())}")
    elif larger := would_fit(recipe, counts, GPU_MEMORY):
        gpus, options = larger.machines.gpus, " ".join(larger.options())
        lines.append(
            f"on a machine of {gpus} GPU{'s' if gpus > 1 else ''} of {_gb(GPU_MEMORY)} would fit, with "
            f"{_gb(larger.fit.peak)} each: {options or 'the recipe as it is'}"
        )
    lines.append("dalle plan says what other machines hold; nothing was allocated or written")
    raise UserError("\n".join(lines))


def _figures(found: Fit) -> str:
    parts = [f"{name} {_gb(part.each)}" for name, part in found.parts.items() if part.place == "device"]
    return ", ".join([*parts, f"activations {_gb(found.activations.kept)}"])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
