"""Work done by a thread before its results are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], count: int) -> Iterator[T]:
    """The same ``items``, up to ``count`` of them made by a thread while earlier ones are in use.

    What ``items`` raises is raised in their place. The thread ends when the iterator is closed or used up, and
    keeps no program from ending.
    """
    made: Queue[tuple[T] | BaseException | None] = Queue(count)
    closed = Event()

    def make() -> None:
        try:
            for item in items:
                made.put((item,))
                if closed.is_set():
                    return
            made.put(None)
        except BaseException as error:
            made.put(error)

    Thread(target=make, daemon=True).start()
    try:
        while (found := made.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        closed.set()
        while not made.empty():  # a full queue would hold the thread up
            made.get_nowait()
