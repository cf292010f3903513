"""What training the prior holds in memory from update to update, counted from the shapes that the code makes.

Nothing is allocated or run: sizes follow from the recipe alone, so that a plan of the largest prior takes no time. What
is there for a while besides is in ``planning/activations.py`` and ``planning/peaks.py``.

Counted are tensors. Not counted, and left to a reserve: Python and its libraries, a GPU's context, the buffers of
matrix and communication libraries, what an allocator loses to fragments, token batches read ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

from dalle_cli.config.schema import PriorSettings
from dalle_cli.distributed.compression import factor_rank, is_compressed, shard_rank, shard_shape
from dalle_cli.prior.counts import Counts

BYTES_16, BYTES_32 = 2, 4


@dataclass(frozen=True)
class Machines:
    """``nodes`` machines of ``gpus`` processes each, with ``memory`` bytes a process. A process has a GPU, or with
    ``on_cpu`` its share of the machine's memory.
    """

    gpus: int
    nodes: int
    memory: int
    on_cpu: bool = False

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Held:
    """What stays in memory from update to update: bytes in 16 and in 32 bit, whole, and among how many processes they
    are split, but for those that are ``small`` parameters'.
    """

    in_16: int
    in_32: int
    small: int = 0
    shards: int = 1
    place: str = "device"

    @property
    def whole(self) -> int:
        return self.in_16 + self.in_32

    @property
    def each(self) -> int:
        """Bytes of one process."""
        return self.small + -(-(self.whole - self.small) // self.shards)


def held(stage: PriorSettings, counts: Counts, machines: Machines) -> dict[str, Held]:
    """Weights, gradients, Adam's moments, averaged weights and PowerSGD's state between two updates.

    As ``training/state.py``, ``precision/adam.py``, ``distributed/fsdp.py`` and
    ``distributed/error_buffers.py`` keep them.
    """
    shards = shards_of(stage, machines)
    offloads = stage.sharding.zero > 0 and machines.world > 1 and not machines.on_cpu
    place = "device" if stage.sharding.offload == "none" or not offloads else stage.sharding.offload
    beside = place if stage.training.ema_every == 1 or machines.on_cpu else "cpu"
    small = BYTES_32 * counts.small
    in_16, in_32 = 0, BYTES_32 * counts.total
    if stage.precision != "fp32":
        in_16, in_32 = BYTES_16 * counts.effective, BYTES_32 * counts.other
    parts = {
        "weights": Held(in_16, in_32, small, shards, place),
        "gradients": Held(in_16, in_32, small, shards, place),
        "moments": Held(2 * in_16, 2 * in_32, 2 * small, shards, place),
        "average": Held(0, BYTES_32 * counts.total, small, shards, beside),
    }
    if uses_powersgd(stage, machines):
        shapes, rank = compressed(stage, counts, shards), shard_rank(stage.powersgd.rank, shards)
        if stage.powersgd.error_feedback:
            errors = sum(rows * columns for rows, columns in shapes)
            parts["PowerSGD's errors"] = _kept(stage, machines, shards, errors)
        factors = sum(shape[1] * factor_rank(shape, rank) for shape in shapes)
        parts["PowerSGD's factors"] = _kept(stage, machines, shards, factors)
    return parts


def _kept(stage: PriorSettings, machines: Machines, shards: int, numbers: int) -> Held:
    """``numbers`` of each process that PowerSGD keeps."""
    place = "cpu" if stage.powersgd.offload == "cpu" and not machines.on_cpu else "device"
    if stage.precision == "fp32":
        return Held(0, shards * BYTES_32 * numbers, shards=shards, place=place)
    return Held(shards * BYTES_16 * numbers, 0, shards=shards, place=place)


def shards_of(stage: PriorSettings, machines: Machines) -> int:
    """Processes that hold the model together."""
    return stage.sharding.node_size or machines.gpus if stage.sharding.zero else 1


def uses_powersgd(stage: PriorSettings, machines: Machines) -> bool:
    """Whether gradients cross between machines through factors: between groups of processes with shards."""
    return stage.powersgd.rank > 0 and stage.sharding.zero > 0 and machines.world > shards_of(stage, machines)


def compressed(stage: PriorSettings, counts: Counts, shards: int) -> list[tuple[int, int]]:
    """Shapes of a process's shards that go through PowerSGD's factors."""
    settings, rank = stage.powersgd, shard_rank(stage.powersgd.rank, shards)
    shapes = [shard_shape(matrix, shards) for matrix in counts.matrices]
    return [shape for shape in shapes if is_compressed(shape, rank, settings.min_compression)]
