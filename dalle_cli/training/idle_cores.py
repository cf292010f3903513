"""Threads for the cores that other programs leave idle.

The threads of an operation wait for each other, and oneDNN's do so without sleeping. So one other busy program on two
cores makes a training with two threads three to four times as slow, and with one thread not slower at all.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from dalle_cli.errors import UserError
from dalle_cli.progress import log

PERIOD = 3.0
"""Seconds between two looks at what other programs do."""
_STAT = Path("/proc/stat")
_WORKING = (1, 2, 3, 6, 7)
"""Fields of a core's line in _STAT that count time of programs and of the kernel."""


class IdleCores:
    """Keeps torch's number of threads at the number of cores that no other program uses, at most what it was.

    ``cores`` are the numbers of the cores that this process may use.

    Raises:
        UserError: this system does not tell what its cores do.
    """

    def __init__(self, cores: set[int] | None = None, period: float = PERIOD) -> None:
        if not _STAT.is_file():
            raise UserError("threads: idle needs /proc/stat, which this system lacks; give a number of threads")
        self.cores, self.period = cores or os.sched_getaffinity(0), period
        self._most = self._wanted = torch.get_num_threads()
        self._last = self._look()

    def follow(self) -> None:
        """Set the number of threads, if two looks in succession agree on another; call it between updates."""
        now, work, own = self._last
        if time.monotonic() < now + self.period:
            return
        self._last = self._look()
        seconds = (self._last[0] - now) * os.sysconf("SC_CLK_TCK")
        others = max(0.0, (self._last[1] - work) - (self._last[2] - own)) / seconds
        wanted = max(1, min(self._most, int(len(self.cores) - others + 0.5)))
        if wanted == self._wanted != torch.get_num_threads():
            log(f"threads: {wanted} from here on; other programs use {others:.1f} of {len(self.cores)} cores")
            torch.set_num_threads(wanted)
        self._wanted = wanted

    def _look(self) -> tuple[float, int, int]:
        """Return the time, and the ticks that the cores and that this program have worked so far."""
        return time.monotonic(), ticks_of_cores(self.cores), ticks_of_program(os.getpid())


def ticks_of_cores(cores: set[int]) -> int:
    """Return the ticks that cores have worked since the machine started."""
    total = 0
    for line in _STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            total += sum(int(fields[field - 1]) for field in _WORKING)
    return total


def ticks_of_program(process: int) -> int:
    """Return the ticks that a process, its threads and all processes below it have worked."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # a process may end meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            # Its own ticks in programs and the kernel, and those of its children that have ended.
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))

    def below(candidate: int) -> bool:
        while candidate not in (process, 0):
            candidate = parents.get(candidate, 0)
        return candidate == process

    return sum(count for candidate, count in ticks.items() if below(candidate))
