"""Liveness: finding the ranks that no longer answer, once a collective has failed.

Ranks announce themselves in the store that ``torch.distributed`` uses for rendezvous, which the failed collective does
not involve. Nothing is sent in normal operation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

ANSWER_SECONDS = 10.0
"""Seconds to wait for other ranks' answers; all ranks that waited for a hung one ask at about the same time."""
_STORE_SECONDS = 5.0
"""Additional seconds to wait for the store."""
_STAY_SECONDS = 3.0
"""Seconds that rank 0 waits before it ends, as the store may end with it while other ranks still ask."""
_POLL_SECONDS = 1.0


def absent_ranks(rank: int, size: int, seconds: float = ANSWER_SECONDS) -> list[int] | None:
    """Announce ``rank`` and return those of ``size`` ranks that do not announce themselves within ``seconds``.

    The result is [0] if the store, on rank 0's node, does not answer, and None if the ranks never met.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
    except ValueError:
        return None
    absent = [0]

    def all_present(ranks: range) -> bool:
        return store.check([_key(other) for other in ranks])

    def ask() -> None:
        with suppress(RuntimeError):  # the store is gone
            store.set(_key(rank), "here")
            deadline = time.monotonic() + seconds
            while True:
                absent[:] = find_absent(all_present, 0, size)
                if not absent or time.monotonic() > deadline:
                    return
                time.sleep(_POLL_SECONDS)

    # In a thread, because a store whose process hangs would block the caller forever.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + _STORE_SECONDS)
    if rank == 0:
        time.sleep(_STAY_SECONDS)
    return list(absent)


def find_absent(all_present: Callable[[range], bool], first: int, stop: int) -> list[int]:
    """Return the ranks in [first, stop) that have not answered, by bisection, since most have."""
    if all_present(range(first, stop)):
        return []
    if stop - first == 1:
        return [first]
    middle = (first + stop) // 2
    return find_absent(all_present, first, middle) + find_absent(all_present, middle, stop)


def describe_absent(absent: list[int] | None) -> str:
    """Describe the result of ``absent_ranks`` as a clause of an error message."""
    if absent is None:
        return "one of them ended, hangs or never started"
    if not absent:
        return "all of them answer now, so one was too slow"
    if len(absent) == 1:
        return f"rank {absent[0]} does not answer: it ended or hangs"
    return f"ranks {', '.join(map(str, absent))} do not answer: they ended or hang"


def _key(rank: int) -> str:
    return f"liveness/{rank}"
