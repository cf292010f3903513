"""Where this process stands among those that a launcher started, from the environment. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dalle_cli.errors import UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """Process ``rank`` of ``size``, the ``local_rank``-th on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether it is the one that logs, validates and writes."""
        return self.rank == 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun, or a launcher like it, says of this process; without RANK and WORLD_SIZE it is alone.

    Raises:
        UserError: variables are missing, are no numbers, or contradict one another.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Launch()
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise UserError(
            f"environment: {' and '.join(missing)} not set, but RANK or WORLD_SIZE is: start the processes with "
            "torchrun, or unset both to train in one process"
        )
    rank, size, local_rank, port = (_number(environment, name) for name in _VARIABLES if name != "MASTER_ADDR")
    if not (0 <= local_rank <= rank < size and 0 < port < 65536):
        raise UserError(
            f"environment: RANK {rank}, WORLD_SIZE {size}, LOCAL_RANK {local_rank}, MASTER_PORT {port} contradict one "
            "another: ranks run from 0 to WORLD_SIZE - 1 and a local rank is at most the rank; torchrun sets them right"
        )
    return Launch(rank, size, local_rank)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"environment: {name} is {environment[name]!r}, not a number; torchrun sets it right") from None
