"""A file that is read by ranges of bytes as a stream."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any


class Ranges(io.RawIOBase):
    """A raw stream of ``size`` bytes, each read of which is a call of ``read`` with an offset and a number of bytes."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._position = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        buffer[:size] = self._read(self._position, size)
        self._position += size
        return size
