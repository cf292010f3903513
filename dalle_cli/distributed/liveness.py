"""Which processes of a run still answer, asked by those that waited for one in vain.

They ask at the store that ``torch.distributed`` had them meet by, which is no part of what failed. Nothing is asked as
long as all goes well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

ANSWER = 10.0
"""Seconds that the others have to answer: all that waited give up at about the same time, or at once where another
process's connection breaks."""
_STORE = 5.0
"""Seconds more that the store has."""
_STAY = 3.0
"""Seconds that process 0 stays for those that ask a little later: the store may end with it."""
_POLL = 1.0


def roll_call(rank: int, size: int, seconds: float = ANSWER) -> list[int] | None:
    """Say that process ``rank`` of ``size`` is there.

    Returns:
        The ranks that have not said so within ``seconds``; rank 0 where the store, which is at its machine, does not
        answer. None if the processes have not met.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
    except ValueError:
        return None
    found = [0]

    def are_there(ranks: range) -> bool:
        return store.check([_key(other) for other in ranks])

    def ask() -> None:
        store.set(_key(rank), "here")
        deadline = time.monotonic() + seconds
        while True:
            found[:] = _absent(are_there, 0, size)
            if not found or time.monotonic() > deadline:
                return
            time.sleep(_POLL)

    # In a thread of its own: a store whose process hangs would keep the one who asks for ever.
    thread = threading.Thread(target=_quietly, args=[ask], daemon=True)
    thread.start()
    thread.join(seconds + _STORE)
    if rank == 0:
        time.sleep(_STAY)
    return list(found)


def describe(absent: list[int] | None) -> str:
    """What ``roll_call`` came to, as the middle of a sentence."""
    if absent is None:
        return "one of them ended, hangs or never came"
    if not absent:
        return "all of them answer now: one was too late"
    if len(absent) == 1:
        return f"process {absent[0]} does not answer: it ended or hangs"
    return f"processes {', '.join(map(str, absent))} do not answer: they ended or hang"


def _absent(are_there: Callable[[range], bool], first: int, stop: int) -> list[int]:
    """Those of the ranks that are not, by halves: few are of many."""
    if are_there(range(first, stop)):
        return []
    if stop - first == 1:
        return [first]
    middle = (first + stop) // 2
    return _absent(are_there, first, middle) + _absent(are_there, middle, stop)


def _key(rank: int) -> str:
    return f"roll-call/{rank}"


def _quietly(ask: Callable[[], None]) -> None:
    try:
        ask()
    except RuntimeError:
        return
