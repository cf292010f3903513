"""This process's rank, read from the environment that its launcher set. Imports nothing heavy.

Two sets of variables are understood: torchrun's RANK, WORLD_SIZE and so on, and srun's SLURM_PROCID and so on, from
which the rendezvous address is derived. ``distributed/spawn.py`` starts ranks without a launcher.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dalle_cli.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Variables with the number of ranks on this node: torchrun's, and DeepSpeed's."""
_NODES = ("GROUP_RANK", "CROSS_RANK")
"""Variables with the index of this node: torchrun's, and DeepSpeed's."""
_SLURM_SPECIAL_STEP = 0xFFFF_FFF0
"""Lowest of Slurm's reserved step ids, for batch scripts and interactive shells, which run a single task."""
_FIRST_PORT, _PORTS = 20_000, 10_000
"""Range of rendezvous ports under Slurm, below the ports that operating systems assign."""


@dataclass(frozen=True)
class Launch:
    """Rank ``rank`` of ``size``, ``local_rank`` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int | None = 1
    """Number of ranks on this node; None if the launcher does not say."""
    node: int = 0
    """Index of this node, from 0."""
    rendezvous: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Environment variables with which ``torch.distributed`` finds the other ranks."""

    @property
    def leads(self) -> bool:
        """True for rank 0, which logs, validates and writes."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read this process's rank from the launcher's variables; without a launcher, the process is alone.

    Raises:
        UserError: variables are missing, are not numbers, or contradict one another.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _read_torchrun(environment)
    if _is_slurm_task(environment):
        return _read_slurm(environment)
    return Launch()


def _read_torchrun(environment: Mapping[str, str]) -> Launch:
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise UserError(
            f"environment: {' and '.join(missing)} not set, but RANK or WORLD_SIZE is: start the ranks with torchrun, "
            "or unset both to train in one process"
        )
    rank, size, local_rank, port = (_number(environment, name) for name in _VARIABLES if name != "MASTER_ADDR")
    if not (0 <= local_rank <= rank < size and 0 < port < 65536):
        raise UserError(
            f"environment: RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank}, MASTER_PORT {port} contradict one "
            "another: ranks run from 0 to WORLD_SIZE - 1 and a local rank is at most the rank; torchrun sets them right"
        )
    local_size = _first_number(environment, _LOCAL_SIZES)
    if size == 1 and local_size is None:
        local_size = 1
    node = _first_number(environment, _NODES)
    if node is None:
        node = 0 if local_size is None else rank // max(1, local_size)
    launch = Launch(rank, size, local_rank, local_size, node, {name: environment[name] for name in _VARIABLES})
    _check_machine(launch, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return launch


def _is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process as a task. A batch script has the variables too, but is alone."""
    if not environment.get("SLURM_PROCID") or not environment.get("SLURM_STEP_ID"):
        return False
    return _number(environment, "SLURM_STEP_ID") < _SLURM_SPECIAL_STEP


def _read_slurm(environment: Mapping[str, str]) -> Launch:
    size_name = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    names = ("SLURM_PROCID", size_name, "SLURM_LOCALID", "SLURM_NODEID")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UserError(
            f"environment: {' and '.join(missing)} not set, but SLURM_PROCID is: start the ranks with srun, or "
            "unset SLURM_PROCID to train in one process"
        )
    rank, size, local_rank, node = (_number(environment, name) for name in names)
    if not 0 <= local_rank <= rank < size:
        raise UserError(
            f"environment: SLURM_PROCID {rank}, {size_name} {size}, SLURM_LOCALID {local_rank} contradict one another: "
            "ranks run from 0 to the number of tasks - 1 and a local rank is at most the rank; srun sets them right"
        )
    if size == 1:
        return Launch()
    local_size = _slurm_local_size(environment, node)
    rendezvous = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        **({} if local_size is None else {"LOCAL_WORLD_SIZE": str(local_size)}),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _slurm_first_host(environment),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_slurm_port(environment)),
    }
    launch = Launch(rank, size, local_rank, local_size, node, rendezvous)
    _check_machine(launch, "SLURM_PROCID", size_name, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    return launch


def _check_machine(launch: Launch, rank: str, size: str, local_rank: str, local_size: str) -> None:
    """Raise UserError if the local rank, local size and node contradict one another; the rest names the variables."""
    if launch.local_size is None:
        return
    first = launch.rank - launch.local_rank
    fits = launch.local_rank < launch.local_size and first + launch.local_size <= launch.size
    if not fits or (first > 0) != (launch.node > 0):
        raise UserError(
            f"environment: {rank} {launch.rank}, {size} {launch.size}, {local_rank} {launch.local_rank}, {local_size} "
            f"{launch.local_size} on node {launch.node} contradict one another: the ranks of a node are "
            "consecutive; start them with torchrun or srun (and its --distribution=block)"
        )


def _slurm_local_size(environment: Mapping[str, str], node: int) -> int | None:
    """Return the number of tasks on ``node``, from a text such as ``8(x2),4``: two nodes of 8, one of 4."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise UserError(
                f"environment: SLURM_STEP_TASKS_PER_NODE is {text!r}, not numbers such as 8(x2); srun sets it right"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts[node] if node < len(counts) else None


def _slurm_first_host(environment: Mapping[str, str]) -> str:
    """Return the host of task 0, which is the first of a list such as ``gpu[03-05,9],big1``."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    if found is not None:
        return found[1] + (found[2] or "") + (found[3] or "")
    if address := environment.get("SLURM_LAUNCH_NODE_IPADDR"):
        return address
    raise UserError(
        "environment: neither SLURM_JOB_NODELIST nor SLURM_LAUNCH_NODE_IPADDR says where rank 0 is; "
        "set MASTER_ADDR to its node"
    )


def _slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port that differs between jobs and steps that are likely to share a node."""
    job = _number(environment, "SLURM_JOB_ID") if environment.get("SLURM_JOB_ID") else 0
    return _FIRST_PORT + (job * 7 + _number(environment, "SLURM_STEP_ID")) % _PORTS


def _first_number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_number(environment, name) for name in names if environment.get(name)), None)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(
            f"environment: {name} is {environment[name]!r}, not a number; the launcher sets it right"
        ) from None
