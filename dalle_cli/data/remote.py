"""Files of a source on another machine, by fsspec: ``https://``, ``s3://``, ``gs://``, ``hf://`` and its other kinds.

A file is read by ranges of bytes, each tried again after a pause if the connection fails. With DALLE_CACHE, the name of
a folder, files are downloaded there whole and read from there.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import explain_os_errors, locked, rename_synced, user_cache

CACHE = "DALLE_CACHE"
"""Environment variable that names the folder of downloaded files."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of a read that failed."""
GONE, PASSING = (404, 410), (408, 429)
"""HTTP's answers that a file is not there, and refusals that are worth another try."""
_MARKS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "xet_hash",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
    "created",
)
"""Keys by which filesystems tell a version of a file."""
READ_AHEAD = 4 << 20
"""Bytes that are read at once while a file is read from its start."""

Result = TypeVar("Result")


def is_remote(spec: str) -> bool:
    """Return whether ``spec`` is an address, such as ``https://...``, rather than a path."""
    return "://" in spec


class _Missing(UserError):
    """There is no file at an address."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> PurePosixPath:
        """The address without its protocol, as a path."""
        return PurePosixPath(self.url.partition("://")[2])

    def size(self) -> int:
        """Return the number of bytes; see ``state``."""
        return self.state()[0]

    def state(self) -> tuple[int, str]:
        """Return the number of bytes, and the server's mark of this version, "" if it has none.

        Raises:
            UserError: the file is missing or cannot be reached.
        """
        found = _again(self.url, lambda: _filesystem(self.url).info(self.url))
        if found["size"] is None:
            raise UserError(f"{self.url}: its server does not say how large it is; download it, or set {CACHE}")
        return int(found["size"]), next((str(found[mark]) for mark in _MARKS if found.get(mark)), "")

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            UserError: the file cannot be reached, or is shorter.
        """

        def read() -> bytes:
            data: bytes = _filesystem(self.url).cat_file(self.url, start=offset, end=offset + size)
            if len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        return _again(self.url, read) if size else b""

    def open(self) -> io.RawIOBase:
        """Return the file for reading from its start; see READ_AHEAD."""
        return _Ranges(self)


class _Ranges(io.RawIOBase):
    """A remote file as a raw stream, each read of which is a range."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._size, self._position = file, file.size(), 0

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
        buffer[:size] = self._file.read(self._position, size)
        self._position += size
        return size


def files_at(url: str, endings: tuple[str, ...]) -> list[RemoteFile]:
    """Return the files at an address, or in the folder there and its folder ``data``, whose names end so, sorted.

    Raises:
        UserError: the address cannot be reached.
    """
    if url.lower().endswith(endings):
        return [RemoteFile(url)]
    for folder in (url.rstrip("/"), f"{url.rstrip('/')}/data"):
        found = sorted(name for name in _listed(folder) if name.lower().endswith(endings))
        if found:
            return [RemoteFile(name) for name in found]
    return []


def _listed(folder: str) -> list[str]:
    """Return the addresses of a folder's files; none if there is no such folder."""
    filesystem = _filesystem(folder)
    try:
        names = _again(folder, lambda: filesystem.ls(folder, detail=False))
    except _Missing:
        return []
    return [filesystem.unstrip_protocol(name) for name in names]


def local_copy(file: RemoteFile) -> Path:
    """Return the file's copy in the cache, by default ``~/.cache/dalle/remote``; download it if it is not there.

    Raises:
        UserError: the file cannot be reached.
    """
    base = os.environ.get(CACHE) or user_cache("remote")
    if ".." in file.path.parts:
        raise UserError(f"{file}: leads out of its folder; write the address without ..")
    # The folders are those of the address, since they are part of the samples' keys.
    copy = Path(base) / file.url.partition("://")[0] / str(file.path).lstrip("/")
    folder = copy.parent
    with explain_os_errors(copy), ExitStack() as held:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder / f"{copy.name}.lock"))
        if not copy.is_file():
            size, version = file.state()
            # The rest of another version would be joined to the beginning of this one.
            partial = folder / f"{copy.name}.{size}{hashlib.sha256(version.encode()).hexdigest()[:8]}.partial"
            log(f"{file}: {size:,} bytes, into {copy}")
            with partial.open("ab") as out:  # goes on with what an earlier process downloaded
                out.truncate(min(out.tell(), size))
                for start in range(out.seek(0, os.SEEK_END), size, READ_AHEAD):
                    out.write(file.read(start, min(READ_AHEAD, size - start)))
            rename_synced(partial, copy)
    return copy


def _again(url: str, call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns, trying again after each of PAUSES.

    Raises:
        UserError: every try failed; _Missing if there is no such file.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # each filesystem has errors of its own
            # The one of HTTP calls any failure a missing file, and keeps the true one as its cause.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            status = getattr(cause, "status", None)
            if isinstance(cause, FileNotFoundError) or status in GONE:
                raise _Missing(f"{url}: no such file") from None
            reason = str(cause).partition("\n")[0] or type(cause).__name__
            refused = isinstance(cause, PermissionError) or (status in range(400, 500) and status not in PASSING)
            if pause is None or refused:
                raise UserError(f"{url}: cannot be read ({reason}); look at the network and your credentials") from None
            log(f"{url}: {reason}; trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError


def _filesystem(url: str) -> Any:
    """Return fsspec's filesystem of an address; every process has its own, since connections do not survive a fork."""
    protocol, _, rest = url.partition("://")
    return _filesystem_of(protocol, rest.partition("/")[0], os.getpid())


@lru_cache
def _filesystem_of(protocol: str, host: str, _: int) -> Any:
    from fsspec.core import url_to_fs

    url = f"{protocol}://{host}"
    try:
        return url_to_fs(url, skip_instance_cache=True)[0]
    except ImportError as error:
        raise UserError(f"{url}: {error}; pip install 'dalle-toolchain[remote]'") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; name a path, or an address such as https:// or s3://") from None
