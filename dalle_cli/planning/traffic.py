"""Traffic between nodes in an update of the prior, with and without PowerSGD (paper, section 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.config.shipped import shipped_recipes
from dalle_cli.distributed.compression import (
    GPUS_PER_NODE,
    compression_rate,
    is_compressed,
    numbers_sent,
    paper_compression_rate,
    shard_rank,
)
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import (
    BYTES_16,
    BYTES_32,
    Machines,
    other_shards,
    shard_shapes,
    shards_of,
    uses_powersgd,
)
from dalle_cli.prior.counts import Counts, count_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class WholeAndSent(Generic[T]):
    """A quantity for uncompressed gradients (``whole``), and for the gradients as the recipe sends them (``sent``)."""

    whole: T
    sent: T


@dataclass(frozen=True)
class Traffic:
    """Traffic of an update."""

    a_process: WholeAndSent[int]
    """Bytes that the rank with the largest shards hands to the collectives: their gradients."""
    a_machine_on_the_link: WholeAndSent[float]
    """Bytes that a node sends; it receives as many."""
    seconds: WholeAndSent[float | None]
    """Seconds on a node's link; None if its bandwidth is unknown."""
    compression: float
    """Share of a rank's bytes that PowerSGD saves."""


def between_machines(
    stage: PriorSettings, counts: Counts, machines: Machines, interconnect: float | None = None
) -> Traffic:
    """Return the traffic between nodes, whose links carry ``interconnect`` bits per second each way, if known.

    With ZeRO each rank of a node is part of its own ring through all nodes. Without it a single ring goes through all
    ranks, and once through each node. PowerSGD sends factors in 16 bit if the recipe trains in 16 bit, and the rest in
    32 bit. Padding of its messages is not counted. Under DeepSpeed all gradients are in 32 bit, and those of the
    resblocks' gains and biases are in shards too; otherwise every rank holds these whole, and a ring through all ranks
    sums them.
    """
    shards, rings = shards_of(stage, machines), machines.gpus if stage.sharding.zero > 0 else 1
    by_deepspeed = stage.sharding.engine == "deepspeed"
    width = BYTES_32 if by_deepspeed or stage.precision == "fp32" else BYTES_16
    shapes = shard_shapes(stage, counts, shards)
    small, others = counts.small, sum(other_shards(stage, counts, shards))
    if by_deepspeed:
        small, others = 0, others + -(-small // shards)
    small, others = BYTES_32 * small, BYTES_32 * others
    whole = width * sum(rows * columns for rows, columns in shapes) + others
    handed = whole
    if uses_powersgd(stage, machines):
        rank, least = shard_rank(stage.powersgd.rank, shards), stage.powersgd.min_compression
        widths = [width if is_compressed(shape, rank, least) else BYTES_32 for shape in shapes]
        handed = others
        handed += sum(each * numbers_sent(shape, rank, least) for each, shape in zip(widths, shapes, strict=True))

    def on_link(of_rank: int) -> float:
        # In a ring all-reduce among k nodes each sends 2 (k - 1) / k times its bytes, as in ``all_reduce_mean``.
        return (rings * of_rank + small) * 2 * (machines.nodes - 1) / machines.nodes

    def seconds(size: float) -> float | None:
        return None if interconnect is None else 8 * size / interconnect

    link = WholeAndSent(on_link(whole), on_link(handed))
    return Traffic(
        WholeAndSent(whole, handed),
        link,
        WholeAndSent(seconds(link.whole), seconds(link.sent)),
        1 - handed / whole,
    )


@dataclass(frozen=True)
class CompressionRow:
    """A recipe's row of the paper's table 1, for eight GPUs per node: shares of the gradients that PowerSGD saves."""

    recipe: str
    effective_parameters: int
    d_model: int
    rank: int
    paper: float
    """The paper's closed form."""
    shards: float
    """Share of the values of the resblocks' matrices, as this project shards them."""
    bytes: float
    """Share of the bytes of all gradients."""


def compression_row(recipe: Recipe, counts: Counts) -> CompressionRow:
    """Return the recipe's row of the compression table."""
    gpus, stage = GPUS_PER_NODE, recipe.prior
    sharded = stage.model_copy(update={"sharding": stage.sharding.model_copy(update={"zero": 3, "node_size": None})})
    traffic = between_machines(sharded, counts, Machines(gpus, nodes=2, memory=0))
    rank = stage.powersgd.rank
    shapes = shard_shapes(sharded, counts, gpus)
    return CompressionRow(
        recipe=recipe.name,
        effective_parameters=counts.effective,
        d_model=stage.model.d_model,
        rank=rank,
        paper=paper_compression_rate(stage.model.d_model, rank, gpus),
        shards=compression_rate(shapes, shard_rank(rank, gpus), stage.powersgd.min_compression),
        bytes=traffic.compression,
    )


def compression_table(files: Sequence[Path] | None, overrides: Sequence[str] = ()) -> list[CompressionRow]:
    """Return the rows of the recipes that use PowerSGD, smallest first; ``files`` None means all shipped ones.

    Raises:
        UserError: none of the recipes uses PowerSGD.
    """
    found = list(shipped_recipes().values()) if files is None else files
    recipes = [recipe for file in found if (recipe := load_recipe(file, overrides)).prior.powersgd.rank]
    if not recipes:
        named = "no shipped recipe has" if files is None else f"{files[0]}: the recipe does not have"
        raise UserError(f"{named} prior.powersgd.rank above 0; name a recipe that has, or raise it with --set")
    rows = [compression_row(recipe, count_parameters(recipe)) for recipe in recipes]
    return sorted(rows, key=lambda row: row.effective_parameters)
