"""Data parallelism: processes that each take a part of every batch and add up their gradients.

The loop and the tasks know the other processes through ``Group`` alone. Where every process holds the whole model,
their weights stay equal because they start equal and take the same updates; ``distributed/fsdp.py`` has them hold a
part each.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_cli.distributed.device import choose_device
from dalle_cli.distributed.launch import read_launch
from dalle_cli.distributed.liveness import describe, roll_call
from dalle_cli.errors import Stopped, UserError

TIMEOUT = timedelta(minutes=10)
"""A process waits so long for the others: longer than a validation or the saving of a checkpoint takes."""
TIMEOUT_VARIABLE = "DALLE_TIMEOUT"
"""Of the environment: seconds in place of TIMEOUT, for a disk that takes longer to save to, or a test."""
BUCKET = 32 * 2**20
"""Bytes of gradients that travel at once."""
_CPU = torch.device("cpu")
_COMMUNICATION = re.compile("gloo|nccl|connection|socket|timed? ?out|tcpstore|rendezvous", re.IGNORECASE)
"""What errors of communication speak of, where they are of no class of their own."""


@dataclass
class Traffic:
    """Bytes that this process has handed to its group's collectives so far. What a link carries of them is the
    collective's affair: a ring of n processes sends 2 (n - 1) / n times as many from each.
    """

    bytes: int = 0


@dataclass(frozen=True)
class Group:
    """The processes that train one model, as process ``rank`` of ``size`` sees them; by default it is alone.

    All must call the same methods in the same order. Alone, they return at once what they were given.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    local_size: int | None = 1
    """How many of them are on this machine; None where the launcher does not say."""
    within: dist.ProcessGroup | None = None
    """These processes as ``torch.distributed`` knows them; None: all that were launched."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def processes(self) -> dist.ProcessGroup:
        """These processes as ``torch.distributed`` knows them."""
        return cast(dist.ProcessGroup, self.within or dist.group.WORLD)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that logs, validates and writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of ``count`` samples are this process's: consecutive ones, as many as the others' or one more."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of the processes' ``value``, the same bytes on each."""
        if self.size == 1:
            return value
        return self._all_reduce(value.detach().to(self.device, copy=True))

    def sum_scalars(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """``sum`` of each of the same named scalars, in one message."""
        if self.size == 1:
            return values
        stacked = self.sum(torch.stack([value.to(self.device, torch.float32) for value in values.values()]))
        return dict(zip(values, stacked, strict=True))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each parameter's gradient by the sum of the processes'."""
        if self.size == 1:
            return
        for bucket in buckets([p.grad for p in parameters if p.grad is not None]):
            total = self._all_reduce(torch.cat([gradient.flatten() for gradient in bucket]).to(self.device))
            for gradient, part in zip(bucket, total.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view(gradient.shape))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on one of the processes."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    def from_leader(self, value: float) -> float:
        """The leader's ``value``."""
        return float(self.sum(torch.tensor(value if self.leads else 0.0, dtype=torch.float64)))

    def gather(self, value: Any) -> list[Any]:
        """Each process's ``value``, anything that can be pickled, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.explained():
            dist.all_gather_object(values, value, group=self.within)
        return values

    def require_same(self, what: str, value: str) -> None:
        """Refuse to go on with processes that do not agree on ``value``.

        Raises:
            UserError: on every process, naming ``what`` and the ones that differ from the leader.
        """
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        digests = torch.zeros(self.size, dtype=torch.int64)
        digests[self.rank] = digest
        digests = self.sum(digests)
        others = [str(rank) for rank in range(self.size) if digests[rank] != digests[0]]
        if others:
            raise UserError(
                f"process {', '.join(others)} of {self.size}: not the {what} of process 0; start all with the same "
                "command, and give an --out that all of them see"
            )

    def wait(self) -> None:
        """Return when every process has come here."""
        self.sum(torch.zeros(()))

    def _all_reduce(self, total: Tensor) -> Tensor:
        self.traffic.bytes += total.nbytes
        with self.explained():
            dist.all_reduce(total, group=self.within)
        return total

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a process that ended, hangs or never came into one line."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error))):
                raise
            reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])
            first, count = (self.rank, self.size) if self.within is None else (dist.get_rank(), dist.get_world_size())
            raise UserError(
                f"process {first} of {count}: lost the others ({reason}); {describe(roll_call(first, count))}; see "
                "what was said last, end them all and start again: training goes on from the last checkpoint"
            ) from error


ALONE = Group()


@contextmanager
def join_group() -> Iterator[Group]:
    """This process's group as the launcher's environment describes it, and its device.

    Raises:
        UserError: the environment contradicts itself or this machine, or the others do not come within TIMEOUT, or
            the seconds that the environment's DALLE_TIMEOUT says.
    """
    launch = read_launch()
    group = Group(launch.rank, launch.size, choose_device(launch.local_rank), launch.local_size)
    if group.size == 1:
        yield group
        return
    on_gpu, timeout = group.device.type == "cuda", _timeout()
    os.environ.update(launch.meeting)
    with group.explained():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=timeout, device_id=group.device if on_gpu else None
        )
    try:
        yield group
    except Stopped:
        dist.destroy_process_group()
        raise
    # Not after an error: the others may never answer, and the process ends anyway.
    dist.destroy_process_group()


def _timeout() -> timedelta:
    if not (told := os.environ.get(TIMEOUT_VARIABLE)):
        return TIMEOUT
    if not told.isdigit() or not int(told):
        raise UserError(
            f"environment: {TIMEOUT_VARIABLE} is {told!r}, not a whole number of seconds; correct or unset it"
        )
    return timedelta(seconds=int(told))


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """``gradients`` in their order, cut into lists of one type of at most BUCKET bytes (or of one gradient)."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@dataclass(frozen=True)
class Nodes:
    """Process ``inside.rank`` of node ``across.rank``."""

    inside: Group
    """The processes of this node, which hold the model together."""
    across: Group
    """The processes that hold the same part of it, one in each node."""


def form_nodes(group: Group, node_size: int | None) -> Nodes:
    """Part ``group`` in nodes of ``node_size`` consecutive ranks; by default a node is a machine.

    Raises:
        UserError: the processes cannot be parted so.
    """
    size = node_size or group.local_size
    sizes = group.gather(size)
    if size is None or sizes != [size] * group.size:
        told = ", ".join(sorted({str(each) for each in sizes}))
        raise UserError(
            f"prior.sharding: a model is sharded among as many processes on each machine, here are {told} of "
            f"{group.size}; start as many on each (torchrun --nproc-per-node), or set prior.sharding.node_size"
        )
    if group.size % size:
        raise UserError(
            f"prior.sharding.node_size: {group.size} processes are no multiple of {size}; set a divisor, or start more"
        )
    count = group.size // size
    inside = _own_group(group, [list(range(node * size, (node + 1) * size)) for node in range(count)])
    across = _own_group(group, [list(range(place, group.size, size)) for place in range(size)])
    return Nodes(inside, across)


def _own_group(group: Group, ranks: list[list[int]]) -> Group:
    """Of the groups of ``ranks``, which all processes make together, the one that this process is in."""
    own = group
    for members in ranks:
        # The first communicator of all processes serves where it can: it is there already.
        within = None if len(members) == group.size else cast(dist.ProcessGroup, dist.new_group(members))
        if group.rank in members:
            own = replace(group, rank=members.index(group.rank), size=len(members), within=within, traffic=Traffic())
    return own
