"""The members of tar shards, on this machine or another, from their headers alone."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dalle_cli.data.copy_checksums import delete_copy, read_checked
from dalle_cli.data.ranges import Ranges
from dalle_cli.data.remote import READ_AHEAD, RemoteFile
from dalle_cli.data.source import read_again
from dalle_cli.errors import Damaged, UserError
from dalle_cli.progress import log

BLOCK = 512
"""Size of a tar archive's blocks in bytes."""
_MAX_HEADER_BYTES = 1 << 20
"""Largest accepted header, which may hold a long name or pax records."""
_TIMES = ("mtime", "atime", "ctime")
"""Pax records that say nothing about a member's name or place."""


@dataclass(frozen=True)
class LocalFile:
    """A shard on this machine."""

    path: Path
    origin: RemoteFile | None = field(default=None, compare=False)
    """The file that this is a copy of, which is read in its place once the copy is deleted: it was damaged, or others
    needed the room."""

    def __str__(self) -> str:
        return str(self.path)

    def state(self) -> tuple[int, str]:
        """Return the size and the time of modification, by which a change is noticed."""
        found = self.path.stat()
        return found.st_size, str(found.st_mtime_ns)

    def open(self) -> io.RawIOBase:
        if self.origin is None:
            return io.FileIO(self.path)
        return Ranges(self.state()[0], partial(self._read_copy, self.origin))

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            BadSample, UserError: see ``read_again``; the file has become shorter.
        """

        def read() -> bytes:
            if self.origin is not None:
                return self._read_copy(self.origin, offset, size)
            # Opened for each read, so that threads, forks and pickled copies share no handle.
            file = os.open(self.path, os.O_RDONLY)
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)

        data = read_again(str(self.path), read)
        if len(data) != size:
            raise UserError(f"{self.path}: is shorter than when it was indexed; run the command again when it is whole")
        return data

    def _read_copy(self, origin: RemoteFile, offset: int, size: int) -> bytes:
        try:
            return read_checked(self.path, offset, size)
        except FileNotFoundError:
            pass
        except Damaged:
            log(f"{self.path}: is not what was downloaded; it is deleted, and {origin} is read in its place")
            delete_copy(self.path)
        return origin.read(offset, size)


TarFile = LocalFile | RemoteFile


class Member(NamedTuple):
    """A member of a shard, which has ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int
    folder: bool = False
    fault: str | None = None
    """Why it is no ordinary file that can be read, such as "a link"."""


def members_of(shard: TarFile) -> list[Member | str]:
    """Return a shard's members in order, then, if the archive is damaged, a message; an OSError is no damage.

    An archive of plain files, as all common programs write it, is walked by its headers' fixed fields. Any other, or a
    damaged one, is read by the standard library, which takes several times as long.
    """
    found = _plain_members(shard)
    return list(_any_members(shard)) if found is None else found


@contextmanager
def _reader(shard: TarFile) -> Iterator[Callable[[int, int], bytes]]:
    """Yield a function that returns bytes of a shard, given their offset and number; fewer at its end."""
    if isinstance(shard, LocalFile) and shard.origin is None:
        handle = os.open(shard.path, os.O_RDONLY)
        try:
            yield lambda offset, size: os.pread(handle, size, offset)
        finally:
            os.close(handle)
        return
    with io.BufferedReader(shard.open(), READ_AHEAD) as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            return file.read(size)

        yield read


def _plain_members(shard: TarFile) -> list[Member | str] | None:
    """Return the members of an undamaged archive of plain files and folders; None if there is anything else in it."""
    found: list[Member | str] = []
    at, long_name = 0, None
    try:
        with _reader(shard) as read:
            while True:
                block = read(at, BLOCK)
                if len(block) < BLOCK:
                    return None
                if not block[0] and block.count(0) == BLOCK:
                    return found
                stated = _octal(block[148:156])
                if stated is None or stated != sum(block) - sum(block[148:156]) + 8 * ord(" "):
                    return None
                kind, size = block[156:157], _octal(block[124:136])
                if size is None:
                    return None
                at += BLOCK
                if kind in (b"L", b"x"):
                    if size > _MAX_HEADER_BYTES or long_name is not None:
                        return None
                    body = read(at, size)
                    name = _until_null(body) if kind == b"L" else _path_in_pax(body)
                    if len(body) != size or name is None:
                        return None
                    long_name = name or None
                elif kind in (b"0", b"\0", b"5"):
                    prefix, name = _until_null(block[345:500]), _until_null(block[:100])
                    if prefix:
                        name = f"{prefix}/{name}"
                    folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
                    name = name if long_name is None else long_name
                    found.append(Member(name.rstrip("/") if folder else name, at, size, folder))
                    long_name = None
                    if folder:
                        size = 0  # a folder has no data, whatever its header says
                else:
                    return None
                at += -(-size // BLOCK) * BLOCK
    except ValueError:
        return None


def _octal(field: bytes) -> int | None:
    """Return the number in a header's field; None if it is not written in octal digits."""
    digits = field.split(b"\0", 1)[0].strip()
    try:
        return int(digits, 8) if digits.isdigit() else (None if digits else 0)
    except ValueError:
        return None


def _until_null(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _path_in_pax(body: bytes) -> str | None:
    """Return the path in pax records, "" if there is none; None if there are records of other kinds."""
    path, at = "", 0
    while at < len(body):
        length, _, _ = body[at : at + 20].partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            return None
        record = body[at + len(length) + 1 : at + int(length)]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or at + int(length) > len(body):
            return None
        if key == b"path":
            path = value[:-1].decode().rstrip("/")
        elif key.decode("ascii", "replace") not in _TIMES:
            return None
        at += int(length)
    return path


class _HeaderFile(io.BufferedReader):
    """A file that refuses to read a header of absurd size, which tarfile would read into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header of absurd size")
        return super().read(size)


def _any_members(shard: TarFile) -> Iterator[Member | str]:
    """Yield the members of any archive by the standard library, then, if it is damaged, a message."""
    found = False
    try:
        ahead = READ_AHEAD if isinstance(shard, RemoteFile) else io.DEFAULT_BUFFER_SIZE
        with _HeaderFile(shard.open(), ahead) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (header := tar.next()) is not None:
                found = True
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                fault = None
                if header.issym() or header.islnk():
                    fault = "a link"
                elif not header.isdir() and (not header.isreg() or header.issparse()):
                    fault = "not an ordinary file"
                yield Member(header.name, header.offset_data, header.size, header.isdir(), fault)
            file.seek(tar.offset)
            block = file.read(BLOCK)
    except (tarfile.TarError, ValueError) as error:
        if found:  # the last member's data or the header after it is damaged
            yield f"the archive is cut short or damaged ({error}); earlier samples are used"
        else:
            yield f"not a readable tar archive ({error}); a compressed one has to be unpacked first"
        return
    # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
    if len(block) < BLOCK or block.strip(b"\0"):
        yield f"the archive is cut short or damaged at byte {tar.offset}; earlier samples are used"
