"""Prefetching of an iterator's items by a thread."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the same items, of which a daemon thread makes up to ``count`` while earlier ones are in use.

    An exception raised by ``items`` is raised again in place of the item. The thread ends with the iterator.
    """
    queue: Queue[tuple[T] | BaseException | None] = Queue(count)
    closed = Event()

    def produce() -> None:
        try:
            for item in items:
                queue.put((item,))
                if closed.is_set():
                    return
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    Thread(target=produce, daemon=True).start()
    try:
        while (found := queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        closed.set()
        while not queue.empty():  # a full queue would block the thread
            queue.get_nowait()
