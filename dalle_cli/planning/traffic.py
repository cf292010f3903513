"""What crosses between machines in an update of the prior, with PowerSGD and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.distributed.compression import (
    GPUS_PER_MACHINE,
    compression,
    is_compressed,
    paper_compression,
    sent,
    shard_rank,
    shard_shape,
)
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import BYTES_16, BYTES_32, Machines, shards_of, uses_powersgd
from dalle_cli.prior.counts import Counts, count_parameters


@dataclass(frozen=True)
class Traffic:
    """Bytes that cross in an update, as they are handed to the collectives."""

    whole: int
    """Of a process: the gradients of its shards as they are, in the types they have."""
    sent: int
    """Of a process: through PowerSGD's factors, where the recipe has them, in 16 bit where it trains in it; all else in
    32 bit then."""
    small: int
    """Of a machine: gains and biases, which all its processes have."""
    processes: int
    """Of a machine, that each hand over their own."""
    nodes: int

    def on_link(self, handed: int) -> float:
        """Bytes that a machine sends, and receives, where each process hands over ``handed``: of k machines each passes
        2 (k - 1) / k of them on, in a ring of all-reduce as in ``mean_16``.
        """
        return (self.processes * handed + self.small) * 2 * (self.nodes - 1) / self.nodes


def between_machines(stage: PriorSettings, counts: Counts, machines: Machines) -> Traffic:
    """Of the recipe's prior. Without ZeRO one ring goes through all processes, and once through each machine.

    Messages of factors in 16 bit are filled up to equal parts for all machines; those few bytes are left out.
    """
    shards, sharded = shards_of(stage, machines), stage.sharding.zero > 0
    width = BYTES_32 if stage.precision == "fp32" else BYTES_16
    shapes = [shard_shape(matrix, shards) for matrix in counts.matrices]
    others = BYTES_32 * sum(-(-number // shards) for number in counts.others)
    whole = width * sum(rows * columns for rows, columns in shapes) + others
    handed = whole
    if uses_powersgd(stage, machines):
        rank, least = shard_rank(stage.powersgd.rank, shards), stage.powersgd.min_compression
        widths = [width if is_compressed(shape, rank, least) else BYTES_32 for shape in shapes]
        handed = others
        handed += sum(each * sent(shape, rank, least) for each, shape in zip(widths, shapes, strict=True))
    return Traffic(whole, handed, BYTES_32 * counts.small, machines.gpus if sharded else 1, machines.nodes)


def compression_row(recipe: Recipe, counts: Counts) -> dict[str, float | int | str]:
    """The recipe's line of the paper's table 1, at eight GPUs a machine: shares that are not sent.

    ``paper`` is its closed form, ``shards`` of the numbers of this project's shards of the resblocks' matrices,
    ``bytes`` of all gradients' bytes, as they are handed to the collectives.
    """
    gpus, stage = GPUS_PER_MACHINE, recipe.prior
    sharded = stage.model_copy(update={"sharding": stage.sharding.model_copy(update={"zero": 3, "node_size": None})})
    traffic = between_machines(sharded, counts, Machines(gpus, nodes=2, memory=0))
    rank = stage.powersgd.rank
    shapes = [shard_shape(matrix, gpus) for matrix in counts.matrices]
    return {
        "recipe": recipe.name,
        "effective_parameters": counts.effective,
        "d_model": stage.model.d_model,
        "rank": rank,
        "paper": paper_compression(stage.model.d_model, rank, gpus),
        "shards": compression(shapes, shard_rank(rank, gpus), stage.powersgd.min_compression),
        "bytes": 1 - traffic.sent / traffic.whole,
    }


def compression_table(
    files: Sequence[Path] | None, overrides: Sequence[str] = ()
) -> list[dict[str, float | int | str]]:
    """``compression_row`` of the recipes in ``files``, or of all in the folder recipes/ that have PowerSGD; small ones
    first.

    Raises:
        UserError: none of them has it.
    """
    found = sorted(Path("recipes").glob("*.yaml")) if files is None else files
    recipes = [recipe for file in found if (recipe := load_recipe(file, overrides)).prior.powersgd.rank]
    if not recipes:
        named = "recipes/: no recipe there" if files is None else f"{files[0]}: the recipe"
        raise UserError(f"{named} has prior.powersgd.rank above 0; name one that has, or give it with --set")
    rows = [compression_row(recipe, count_parameters(recipe)) for recipe in recipes]
    return sorted(rows, key=lambda row: row["effective_parameters"])
