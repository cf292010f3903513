"""The processes in nodes, each of which holds the model once: the groups that communicate with one another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch.distributed as dist

from dalle_cli.errors import UserError
from dalle_cli.training.parallel import Group, Traffic


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
