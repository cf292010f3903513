"""Memory of the training state, which stays from update to update: weights, gradients, moments, EMA, PowerSGD.

Sizes follow from the recipe and the model's shapes; nothing is allocated. ``activations.py`` and ``peaks.py`` add
temporary memory. Only tensors are counted. A reserve covers the rest: Python, GPU contexts, library buffers,
fragmentation and prefetched batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dalle_cli.config.schema import PriorSettings
from dalle_cli.distributed.compression import (
    factor_rank,
    flat_shard_shape,
    is_compressed,
    shard_rank,
    shard_shape,
)
from dalle_cli.distributed.deepspeed_engine import BUCKET_NUMBERS, STATE_BUFFERS, SWAPPED_NUMBERS
from dalle_cli.prior.counts import Counts

BYTES_16, BYTES_32 = 2, 4


@dataclass(frozen=True)
class Machines:
    """The nodes to train on, each with the same number of GPUs and one rank per GPU."""

    gpus: int
    """GPUs per node; without GPUs, ranks per node."""
    nodes: int
    memory: int
    """Bytes of a GPU; without GPUs, a rank's share of the node's memory."""
    on_cpu: bool = False
    """True if the nodes have no GPUs."""
    processes: int = field(init=False)
    """Number of ranks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "processes", self.gpus * self.nodes)


@dataclass(frozen=True)
class StatePart:
    """Bytes of a part of the training state, such as the weights."""

    in_16: int
    """Bytes in 16 bit, over all shards."""
    in_32: int
    """Bytes in 32 bit, over all shards."""
    small: int = 0
    """Bytes, out of these, of small parameters, which every rank holds whole."""
    shards: int = 1
    """Number of ranks that share the rest."""
    place: str = "device"
    """``device``, ``cpu`` for the host's memory, or ``nvme`` for its disk."""
    whole: int = field(init=False)
    """Bytes over all shards."""
    each: int = field(init=False)
    """Bytes per rank."""

    def __post_init__(self) -> None:
        whole = self.in_16 + self.in_32
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "each", self.small + -(-(whole - self.small) // self.shards))


def training_state(stage: PriorSettings, counts: Counts, machines: Machines) -> dict[str, StatePart]:
    """Return the parts of the training state by name."""
    shards = shards_of(stage, machines)
    if stage.sharding.engine == "deepspeed":
        return _deepspeed_state(stage, counts, machines) | _powersgd_state(stage, counts, machines)
    offloads = stage.sharding.zero > 0 and machines.processes > 1 and not machines.on_cpu
    place = stage.sharding.offload if offloads and stage.sharding.offload != "none" else "device"
    ema_place = place if stage.training.ema_every == 1 or machines.on_cpu else "cpu"
    small = BYTES_32 * counts.small
    in_16, in_32 = 0, BYTES_32 * counts.total
    if stage.precision != "fp32":
        in_16, in_32 = BYTES_16 * counts.effective, BYTES_32 * counts.other
    parts = {
        "weights": StatePart(in_16, in_32, small, shards, place),
        "gradients": StatePart(in_16, in_32, small, shards, place),
        "moments": StatePart(2 * in_16, 2 * in_32, 2 * small, shards, place),
        "EMA weights": StatePart(0, BYTES_32 * counts.total, small, shards, ema_place),
    }
    return parts | _powersgd_state(stage, counts, machines)


def _deepspeed_state(stage: PriorSettings, counts: Counts, machines: Machines) -> dict[str, StatePart]:
    """Return the parts of the state under DeepSpeed, where all of it is in 32 bit.

    The model computes with a copy of the weights that are updated. With ZeRO 1 and 2 every rank holds that copy whole,
    and with ZeRO 1 the gradients too. With ZeRO 3 the copy is in shards; DeepSpeed 0.19.8 means to do without it in
    32 bit, but compares the weights' device with a device's name, which never equals it. Offloaded gradients are summed
    in host memory, and then copied to where the optimizer updates, unless ZeRO 2 has a single micro-batch to sum.
    """
    zero, offload, whole = stage.sharding.zero, stage.sharding.offload, BYTES_32 * counts.total
    shards, held = shards_of(stage, machines), "device" if offload == "none" else offload
    host = "device" if held == "device" else "cpu"
    parts = {"weights": StatePart(0, whole, 0, shards, held)}
    if zero < 3:
        parts["weights to compute with"] = StatePart(0, whole, whole, shards)
    else:
        parts["weights to compute with"] = StatePart(0, whole, 0, shards, host)
    parts["gradients"] = StatePart(0, whole, whole, shards) if zero == 1 else StatePart(0, whole, 0, shards, host)
    if held != "device" and (zero != 2 or _accumulates(stage, machines)):
        parts["gradients to update with"] = StatePart(0, whole, 0, shards, held)
    parts["moments"] = StatePart(0, 2 * whole, 0, shards, held)
    ema = "device" if held == "device" and stage.training.ema_every == 1 else "cpu"
    parts["EMA weights"] = StatePart(0, whole, 0, shards, ema)
    bucket = BYTES_32 * min(BUCKET_NUMBERS, counts.total)
    parts["bucket of gradients"] = StatePart(0, bucket, bucket)
    if offload == "nvme":
        buffers = _nvme_buffers(counts, shards)
        parts["buffers of the disk"] = StatePart(0, buffers, buffers, place="cpu")
    return parts


def _nvme_buffers(counts: Counts, shards: int) -> int:
    """Return the bytes of a rank's buffers for what travels to and from the disk."""
    largest = max(rows * columns for rows, columns in counts.matrices + counts.others)
    # A group of parameters ends with the one that makes it large enough.
    group = min(SWAPPED_NUMBERS + largest // shards, max(counts.effective, counts.other) // shards)
    return BYTES_32 * STATE_BUFFERS * group


def _accumulates(stage: PriorSettings, machines: Machines) -> bool:
    """Return whether an update has several micro-batches."""
    samples = -(-stage.training.batch_size // machines.processes)
    return samples > (stage.training.micro_batch or samples)


def _powersgd_state(stage: PriorSettings, counts: Counts, machines: Machines) -> dict[str, StatePart]:
    if not uses_powersgd(stage, machines):
        return {}
    shards, parts = shards_of(stage, machines), {}
    shapes, rank = compressed_shapes(stage, counts, shards), shard_rank(stage.powersgd.rank, shards)
    if stage.powersgd.error_feedback:
        errors = sum(rows * columns for rows, columns in shapes)
        parts["PowerSGD error buffers"] = _powersgd_part(stage, machines, shards, errors)
    factors = sum(shape[1] * factor_rank(shape, rank) for shape in shapes)
    return {**parts, "PowerSGD factors": _powersgd_part(stage, machines, shards, factors)}


def _powersgd_part(stage: PriorSettings, machines: Machines, shards: int, numbers: int) -> StatePart:
    """Return the memory of a part of PowerSGD's state that has ``numbers`` values per rank."""
    place = "cpu" if stage.powersgd.offload == "cpu" and not machines.on_cpu else "device"
    if stage.precision == "fp32" or stage.sharding.engine == "deepspeed":
        return StatePart(0, shards * BYTES_32 * numbers, shards=shards, place=place)
    return StatePart(shards * BYTES_16 * numbers, 0, shards=shards, place=place)


def shards_of(stage: PriorSettings, machines: Machines) -> int:
    """Return the number of ranks that share one copy of the model."""
    return stage.sharding.node_size or machines.gpus if stage.sharding.zero else 1


def uses_powersgd(stage: PriorSettings, machines: Machines) -> bool:
    """Return whether PowerSGD compresses gradients, for which several groups of ranks must each share a model."""
    return stage.powersgd.rank > 0 and stage.sharding.zero > 0 and machines.processes > shards_of(stage, machines)


def shard_shapes(stage: PriorSettings, counts: Counts, shards: int) -> list[tuple[int, int]]:
    """Return the shapes of a rank's shards of the resblocks' matrices; DeepSpeed cuts them into flat pieces."""
    shape = flat_shard_shape if stage.sharding.engine == "deepspeed" else shard_shape
    return [shape(matrix, shards) for matrix in counts.matrices]


def other_shards(stage: PriorSettings, counts: Counts, shards: int) -> list[int]:
    """Return the sizes of the largest shards of ``counts.others``: FSDP splits between rows, DeepSpeed anywhere.

    An unembedding of 401 rows among two ranks therefore gives the first one half a row more under FSDP.
    """
    if stage.sharding.engine == "deepspeed":
        return [-(-rows * columns // shards) for rows, columns in counts.others]
    return [-(-rows // shards) * columns for rows, columns in counts.others]


def compressed_shapes(stage: PriorSettings, counts: Counts, shards: int) -> list[tuple[int, int]]:
    """Return the shapes of a rank's shards, without the shards that PowerSGD leaves uncompressed."""
    settings, rank = stage.powersgd, shard_rank(stage.powersgd.rank, shards)
    shapes = shard_shapes(stage, counts, shards)
    return [shape for shape in shapes if is_compressed(shape, rank, settings.min_compression)]
