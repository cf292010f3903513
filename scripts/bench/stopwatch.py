"""Time a piece of work, for the benchmarks of this folder."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds that a piece of work took."""

    wall: float
    cpu: float
    """CPU time of all threads, and of the worker processes that the work started and waited for."""


def measure(work: Callable[[], object]) -> Times:
    """Run ``work`` once and return how long it took."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    cpu_start, start = cpu(), time.perf_counter()
    work()
    return Times(time.perf_counter() - start, cpu() - cpu_start)
