"""Files of a source on another machine, at ``https://``, ``s3://``, ``gs://``, ``az://`` or ``hf://``.

A file is read by ranges of bytes, each tried again after a pause if the connection fails.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO, TypeVar

from dalle_cli.data.ranges import Ranges
from dalle_cli.data.servers import State, credentials_of, fault_of, server_of
from dalle_cli.errors import UserError
from dalle_cli.progress import log

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of a read that failed."""
READ_AHEAD = 4 << 20
"""Bytes that are read at once while a file is read from its start."""
GAP = 256 << 10
"""Bytes between two ranges up to which they are read as one, about as many as come while a server begins to answer."""

Result = TypeVar("Result")
_reached: set[str] = set()
"""Servers that have answered this process."""
_held: dict[tuple[str, int], bytes] = {}
"""Bytes that were fetched before they are read, by address and offset; see ``holding``."""


def is_remote(spec: str) -> bool:
    """Return whether ``spec`` is an address, such as ``https://...``, rather than a path."""
    return "://" in spec


class Missing(UserError):
    """There is no file at an address."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address."""

    url: str
    listed: State | None = field(default=None, compare=False)
    """The file's state if the server told it with its name, which saves a request for each file."""

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> PurePosixPath:
        """The address without its protocol, as a path."""
        return PurePosixPath(self.url.partition("://")[2])

    def size(self) -> int:
        """Return the number of bytes; see ``state``."""
        return self.state().size

    def state(self) -> State:
        """Return the number of bytes, and the server's mark of this version, "" if it has none.

        Raises:
            UserError: the file is missing or cannot be reached.
        """
        if self.listed is not None:
            return self.listed
        server, path = server_of(self.url)
        return again(self.url, lambda: server.state(path))

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            UserError: the file cannot be reached, or is shorter.
        """
        held = _held.get((self.url, offset))
        return held if held is not None and len(held) == size else self.read_many([(offset, size)])[0]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each of ``ranges``, (offset, size), in few requests; see GAP and ``read``."""
        spans, (server, path) = merged(ranges), server_of(self.url)

        def read() -> list[memoryview]:
            pieces = [memoryview(piece) for piece in server.read(path, spans)]
            for piece, (start, end) in zip(pieces, spans, strict=True):
                if len(piece) != end - start:
                    raise OSError(f"{len(piece)} of {end - start} bytes came")
            return pieces

        pieces = again(self.url, read) if spans else []
        starts = [start for start, _ in spans]
        found = []
        for offset, size in ranges:
            number = bisect_right(starts, offset) - 1
            at = offset - starts[number] if size else 0
            found.append(bytes(pieces[number][at : at + size]) if size else b"")
        return found

    def download(self, into: BinaryIO, size: int) -> None:
        """Append the file to ``into``, which holds its beginning, until it has ``size`` bytes; see ``read``."""
        server, path = server_of(self.url)

        def some() -> None:
            began = into.tell()
            try:
                for data in server.stream(path, began):
                    into.write(data[: size - into.tell()])
            except Exception:
                if into.tell() == began:
                    raise  # else the next try goes on from here, without a pause
            else:
                if into.tell() < size:
                    raise OSError(f"{into.tell()} of {size} bytes came")

        while into.tell() < size:
            again(self.url, some)

    def open(self) -> io.RawIOBase:
        """Return the file for reading from its start; see READ_AHEAD."""
        return Ranges(self.size(), self.read)


@contextmanager
def holding(pieces: Mapping[tuple[str, int], bytes]) -> Iterator[None]:
    """Let this process read ``pieces``, by address and offset, without a request inside the block."""
    _held.update(pieces)
    try:
        yield
    finally:
        for place in pieces:
            _held.pop(place, None)


def merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the start and the end of each span to read for ``ranges``, (offset, size), in order; see GAP."""
    spans: list[tuple[int, int]] = []
    for offset, size in sorted(each for each in ranges if each[1]):
        if spans and offset - spans[-1][1] <= GAP:
            spans[-1] = spans[-1][0], max(spans[-1][1], offset + size)
        else:
            spans.append((offset, offset + size))
    return spans


def files_at(url: str, endings: tuple[str, ...]) -> list[RemoteFile]:
    """Return the files at an address, or in the folder there and its folder ``data``, whose names end so, sorted.

    Raises:
        UserError: the address cannot be reached.
    """
    if url.lower().endswith(endings):
        return [RemoteFile(url)]
    for folder in (url.rstrip("/"), f"{url.rstrip('/')}/data"):
        found = [file for file in _listed(folder) if file.url.lower().endswith(endings)]
        if found:
            return sorted(found, key=lambda file: file.url)
    return []


def _listed(folder: str) -> list[RemoteFile]:
    """Return the files of a folder; none if there is no such folder."""
    server, path = server_of(folder)
    try:
        return [RemoteFile(*file) for file in again(folder, lambda: server.files(path))]
    except Missing:
        return []


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def again(url: str, call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns, trying again after each of PAUSES.

    Raises:
        UserError: every try failed; Missing if there is no such file.
    """
    for pause in (*PAUSES, None):
        try:
            found = call()
            _reached.add(_host(url))
            return found
        except Exception as error:  # each kind of server has errors of its own
            require_another_try(url, error, pause)
            time.sleep(pause or 0)
    raise AssertionError


def require_another_try(url: str, error: Exception, pause: float | None) -> None:
    """Say that what failed with ``error`` is tried again after ``pause`` seconds; None if that was the last try.

    Raises:
        UserError: another try is not worth it; Missing if there is no such file.
    """
    fault = fault_of(error)
    if fault.missing:
        raise Missing(f"{url}: no such file") from None
    # A server that answered before has credentials, so that it is worth asking for them again.
    if pause is None or fault.lasting or (fault.credentials and _host(url) not in _reached):
        mend = fault.mend or f"look at the network and {credentials_of(url)}"
        raise UserError(f"{url}: cannot be read ({fault.reason}); {mend}") from None
    log(f"{url}: {fault.reason}; trying again in {pause:g} s")
