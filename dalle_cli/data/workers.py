"""Worker processes that work on blocks of a source's rows and return results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController, threadpool_limits

from dalle_cli.errors import STOP_SIGNALS, UserError

T = TypeVar("T")

AFRESH = "spawn"
"""Way to start processes that read from servers, since the threads of obstore do not survive a fork."""
_BLOCKS_IN_FLIGHT = 4
"""Number of blocks per process that are submitted before their results are taken; it bounds memory."""
_function: Callable[[Any], Any]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_blocks(
    function: Callable[[range], T],
    blocks: Sequence[range],
    workers: int,
    mend: str = "give fewer --workers",
    *,
    afresh: bool = False,
) -> Iterator[T]:
    """Yield ``function(block)`` for each block in order, computed by ``workers`` processes.

    With one worker, this process computes. ``function`` is sent to each process once, at its start, so it may hold a
    large index. It computes with a single BLAS thread: on small matrices several are far slower, since they wait for
    one another and take cores from the other processes.

    Processes start ``afresh``, which takes seconds, or as forks of this one.

    Raises:
        UserError: a worker process was killed, perhaps for lack of memory; the message ends with ``mend``.
    """
    workers = min(workers, len(blocks))
    if workers < 2:
        threads = ThreadpoolController()
        for block in blocks:
            with threads.limit(limits=1):
                result = function(block)
            yield result
        return
    method = AFRESH if afresh else "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=_start, initargs=(function, os.getpid())
    ) as pool:
        try:
            in_flight: deque[Future[T]] = deque()
            for block in blocks:
                if len(in_flight) == workers * _BLOCKS_IN_FLIGHT:
                    yield in_flight.popleft().result()
                in_flight.append(pool.submit(_call, block))
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool:
            raise UserError(f"a worker process was killed, perhaps for lack of memory; {mend}") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def explain_lost_workers() -> Iterator[None]:
    """Turn torch's error about the worker processes of a DataLoader into a UserError.

    It comes while the process waits for a batch, or, when a worker is killed, at any place of the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise lost_worker(str(error).splitlines()[0]) from None


def lost_worker(reason: str) -> UserError:
    """Return the error about a worker process of a DataLoader that is gone."""
    return UserError(
        f"a worker process that loads pictures was lost ({reason}); if memory ran out, set the stage's "
        "training.workers to less; run the same command again to resume"
    )


def split_blocks(rows: range, size: int) -> list[range]:
    """Split ``rows`` into blocks of ``size``; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def ignore_stop_signals() -> None:
    """Ignore what stops a training in a worker: signals may reach every process, but only the trainer should react."""
    for stop_signal in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(stop_signal, signal.SIG_IGN)


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    threadpool_limits(1)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends the worker at once; the parent prints the message
    Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit when the parent process is gone, since a parent that was killed cannot stop its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(block: range) -> Any:
    return _function(block)
