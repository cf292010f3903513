"""Process groups: the ranks that train one model, each on its part of every batch, and their collectives.

The loop and the tasks know the other ranks through ``Group`` alone. Where every rank holds the whole model, the weights
stay equal because they start equal and get the same updates. ``distributed/fsdp.py`` shards the model instead.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dalle_cli.config.schema import Device
from dalle_cli.distributed.device import choose_device, prepare_process
from dalle_cli.distributed.launch import read_launch
from dalle_cli.distributed.liveness import absent_ranks, describe_absent
from dalle_cli.errors import Stopped, UserError
from dalle_cli.transfers import send

TIMEOUT = timedelta(minutes=10)
"""Time that a rank waits for the others, longer than it takes to validate or to save a checkpoint."""
TIMEOUT_VARIABLE = "DALLE_TIMEOUT"
"""Environment variable with seconds that replace TIMEOUT, for slow disks and for tests."""
BUCKET_BYTES = 32 * 2**20
"""Maximum number of bytes of gradients in one message."""
_CPU = torch.device("cpu")
_COMMUNICATION = re.compile("gloo|nccl|connection|socket|timed? ?out|tcpstore|rendezvous", re.IGNORECASE)
"""Words that mark an error of communication, which often is a plain RuntimeError."""
_formed: set[int] = set()
"""Id of this process, once it has formed a process group; a forked child has another id."""


@dataclass
class Traffic:
    """Counts the bytes that this rank has passed to a group's collectives.

    How many of them cross a link depends on the collective: in a ring of n ranks each sends 2 (n - 1) / n as many.
    """

    bytes: int = 0


@dataclass(frozen=True)
class Group:
    """A group of ``size`` ranks, as seen by ``rank``. By default the process is alone.

    All ranks must call the same methods in the same order. With one rank the methods return their argument at once.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    local_size: int | None = 1
    """Number of ranks on this machine; None if the launcher does not say."""
    subgroup: dist.ProcessGroup | None = None
    """The process group; None for all ranks."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The process group, as ``torch.distributed`` takes it."""
        return cast(dist.ProcessGroup, self.subgroup or dist.group.WORLD)

    @property
    def leads(self) -> bool:
        """True for rank 0, the leader, which logs, validates and writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this rank's slice of ``count`` samples; the lengths of the ranks' slices differ by at most 1."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of the ranks' ``value``, the same bytes on each rank."""
        if self.size == 1:
            return value
        own = value.detach()
        return self._all_reduce(own.clone() if own.device == self.device else send(own, self.device))

    def sum_scalars(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of each named scalar over the ranks, in one message; all ranks give the same names."""
        if self.size == 1:
            return values
        stacked = self.sum(torch.stack([send(value, self.device).to(torch.float32) for value in values.values()]))
        return dict(zip(values, stacked, strict=True))

    def average_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the mean over the ranks; see ``mean_factors``."""
        if self.size == 1:
            return
        given, (before, after) = list(tensors), self.mean_factors()
        for tensor in given:
            tensor.mul_(before)
        self.sum_in_place(given)
        for tensor in given:
            tensor.mul_(after)

    def mean_factors(self) -> tuple[float, float]:
        """Return the factors before and after a sum over the ranks that make it their mean.

        A power of 2 near the root of the number of ranks divides before the sum, and the rest after it, so that 16-bit
        sums neither overflow nor lose small numbers (paper, appendix D, has a constant found by hand).
        """
        before = 2.0 ** math.ceil(math.log2(self.size) / 2)
        return 1 / before, before / self.size

    def sum_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the sum over the ranks, sending many in one message."""
        if self.size == 1:
            return
        for bucket in buckets(list(tensors)):
            total = self._all_reduce(torch.cat([tensor.flatten() for tensor in bucket]).to(self.device))
            for tensor, part in zip(bucket, total.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    def broadcast(self, value: float) -> float:
        """Return the leader's ``value``."""
        return float(self.sum(torch.tensor(value if self.leads else 0.0, dtype=torch.float64)))

    def gather(self, value: Any) -> list[Any]:
        """Return each rank's ``value``, any picklable object, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.explain_lost_ranks():
            dist.all_gather_object(values, value, group=self.subgroup)
        return values

    def require_same(self, what: str, value: str) -> None:
        """Raise UserError on every rank, naming the ranks whose ``value`` of ``what`` differs from rank 0's, if any."""
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        digests = torch.zeros(self.size, dtype=torch.int64)
        digests[self.rank] = digest
        digests = self.sum(digests)
        others = [str(rank) for rank in range(self.size) if digests[rank] != digests[0]]
        if others:
            raise UserError(
                f"rank {', '.join(others)} of {self.size}: not the {what} of rank 0; start all ranks with the same "
                "command, and give an --out that all of them see"
            )

    def barrier(self) -> None:
        """Return when every rank has called this."""
        self.sum(torch.zeros(()))

    @contextmanager
    def explain_lost_ranks(self) -> Iterator[None]:
        """Turn an error of communication into a UserError that names the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, dist.DistError) or _COMMUNICATION.search(str(error))):
                raise
            reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])
            alone = self.subgroup is None
            rank, size = (self.rank, self.size) if alone else (dist.get_rank(), dist.get_world_size())
            raise UserError(
                f"rank {rank} of {size}: lost the other ranks ({reason}); {describe_absent(absent_ranks(rank, size))}; "
                "read the last messages of all ranks, stop them and start again: training resumes from the last "
                "checkpoint"
            ) from error

    def _all_reduce(self, total: Tensor) -> Tensor:
        self.traffic.bytes += total.nbytes
        with self.explain_lost_ranks():
            dist.all_reduce(total, group=self.subgroup)
        return total


ALONE = Group()
"""The group of a process that trains alone, on the CPU."""


def buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield ``gradients`` in order, in lists of one type and of at most BUCKET_BYTES unless a single one is larger."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET_BYTES
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


@contextmanager
def join_group(wanted: Device = "auto") -> Iterator[Group]:
    """Join the group that the launcher's environment describes, after preparing this process for its device.

    ``wanted`` is the recipe's ``device``.

    Raises:
        UserError: the environment contradicts itself or this machine, or the other ranks do not join within TIMEOUT.
    """
    launch = read_launch()
    device = choose_device(wanted, launch.local_rank)
    if device.type == "mps" and launch.size > 1:
        raise UserError(f"device: {launch.size} processes cannot share Apple's GPU; start one, or set device to cpu")
    prepare_process(device)
    group = Group(launch.rank, launch.size, device, launch.local_size)
    if group.size == 1:
        yield group
        return
    on_gpu, timeout = device.type == "cuda", _timeout()
    os.environ.update(launch.rendezvous)
    with group.explain_lost_ranks():
        form_process_group(device, timeout=timeout, device_id=device if on_gpu else None)
    try:
        yield group
    except Stopped:
        dist.destroy_process_group()
        raise
    # Skipped after an error: the other ranks may never answer, and the process ends anyway.
    dist.destroy_process_group()


def form_process_group(device: torch.device, **settings: Any) -> None:
    """Call ``dist.init_process_group`` for ranks on ``device``. The process must then end by ``exit_rank``."""
    _formed.add(os.getpid())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **settings)


def exit_rank(code: int, error: BaseException | None = None) -> None:
    """Print ``error`` and end this process with ``code`` if it has formed a process group, else return.

    Python's own shutdown is skipped, except for the functions registered with ``atexit``. Up to Python 3.13, a thread
    of gloo that drops its last tensors during the shutdown would abort the process.
    """
    if os.getpid() in _formed:
        if error is not None:
            traceback.print_exception(error)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _timeout() -> timedelta:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if not text:
        return TIMEOUT
    if not text.isdigit() or not int(text):
        raise UserError(
            f"environment: {TIMEOUT_VARIABLE} is {text!r}, not a whole number of seconds; correct or unset it"
        )
    return timedelta(seconds=int(text))


@dataclass(frozen=True)
class Nodes:
    """All ranks, arranged in nodes. This process is rank ``inside.rank`` of node ``across.rank``."""

    world: Group
    inside: Group
    """The ranks of this node, which hold the model together."""
    across: Group
    """The ranks that hold the same shards as this one, one in each node."""


def form_nodes(group: Group, node_size: int | None) -> Nodes:
    """Arrange ``group`` in nodes of ``node_size`` consecutive ranks; by default a node is a machine.

    Raises:
        UserError: the number of ranks is not a multiple of the node size, or the machines differ.
    """
    size = node_size or group.local_size
    sizes = group.gather(size)
    if size is None or sizes != [size] * group.size:
        found = ", ".join(sorted({str(each) for each in sizes}))
        raise UserError(
            f"prior.sharding: every machine needs the same number of ranks, here they have {found} of {group.size}; "
            "start equally many on each (torchrun --nproc-per-node), or set prior.sharding.node_size"
        )
    if group.size % size:
        raise UserError(
            f"prior.sharding.node_size: {group.size} ranks are no multiple of {size}; set a divisor, or start more"
        )
    count = group.size // size
    inside = split_group(group, [list(range(node * size, (node + 1) * size)) for node in range(count)])
    across = split_group(group, [list(range(place, group.size, size)) for place in range(size)])
    return Nodes(group, inside, across)


def split_group(group: Group, ranks: list[list[int]]) -> Group:
    """Create a group of each list in ``ranks``, on all ranks together; return the one with this rank."""
    own = group
    for members in ranks:
        # A group of all ranks needs no new communicator.
        subgroup = None if len(members) == group.size else cast(dist.ProcessGroup, dist.new_group(members))
        if group.rank in members:
            rank, size = members.index(group.rank), len(members)
            own = replace(group, rank=rank, size=size, subgroup=subgroup, traffic=Traffic())
    return own
