"""Prefetching of an iterator's items by a thread."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the same items, up to ``count`` of them made by a thread while earlier ones are in use.

    An exception of ``items`` is raised in the place of the item. The thread ends when the iterator is closed or
    exhausted, and does not keep the program from ending.
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
