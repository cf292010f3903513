"""Work on blocks of a source's rows by several processes, its results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController, threadpool_limits

from dalle_cli.errors import STOP_SIGNALS, UserError

T = TypeVar("T")

_AHEAD = 4
"""Blocks a process that are begun before their results are wanted; bounds memory."""
_function: Callable[[Any], Any]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_blocks(function: Callable[[range], T], blocks: Sequence[range], workers: int) -> Iterator[T]:
    """``function`` of each of ``blocks``, by ``workers`` processes, or in this one where that is one.

    ``function`` reaches a process once, when it starts: it may hold a large index. It has one thread for matrices:
    small ones take far longer by several, which wait for one another and keep the other processes' cores busy.

    Raises:
        UserError: a process was killed, as for want of memory.
    """
    workers = min(workers, len(blocks))
    if workers < 2:
        threads = ThreadpoolController()
        for block in blocks:
            with threads.limit(limits=1):
                done = function(block)
            yield done
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context(method), initializer=_start, initargs=(function, os.getpid())
    ) as pool:
        try:
            waiting: deque[Future[T]] = deque()
            for block in blocks:
                if len(waiting) == workers * _AHEAD:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(_call, block))
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was killed, perhaps for want of memory; give less than --workers {workers}"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def split_blocks(rows: range, size: int) -> list[range]:
    """``rows`` in blocks of ``size``, the last one shorter."""
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _start(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    threadpool_limits(1)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it at once; the first process says so
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A process that was killed cannot tell its workers to end."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(block: range) -> Any:
    return _function(block)


def ignore_stop_signals() -> None:
    """Ignore STOP_SIGNALS in a worker process: a launcher may signal every process, and the trainer alone obeys."""
    for which in STOP_SIGNALS:
        signal.signal(which, signal.SIG_IGN)
