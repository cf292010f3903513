"""Checksums of a copy's blocks in a file beside it, so that a flipped bit is noticed when the block is read.

Shards have none, and JPEGs in them would show another picture. Only what is read is checked, since copies may be much
larger than what a command reads of them.
"""

from __future__ import annotations

import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from dalle_cli.data.ranges import Ranges
from dalle_cli.errors import Damaged
from dalle_cli.stores.files import write_atomically

BLOCK = 16 << 10
"""Bytes of a block. Larger ones would make reading a picture slower, smaller ones the file of checksums larger."""
_AT_ONCE = 64 * BLOCK
_CRC = np.dtype("<u4")


def checksums_of(copy: Path) -> Path:
    """Return the place of a copy's checksums."""
    return copy.with_name(f"{copy.name}.crc32")


def keep_checksums(content: Path, copy: Path) -> None:
    """Write the checksums of ``content``, which is the copy or will take its place."""
    found = bytearray()
    with content.open("rb") as file:
        while data := file.read(_AT_ONCE):
            found += _checksums(data)
    write_atomically(checksums_of(copy), bytes(found))


def delete_copy(copy: Path) -> None:
    """Delete a copy and its checksums."""
    copy.unlink(missing_ok=True)
    checksums_of(copy).unlink(missing_ok=True)


def read_checked(copy: Path, offset: int, size: int) -> bytes:
    """Return the ``size`` bytes of a copy from ``offset`` on, of blocks that are what was downloaded.

    Raises:
        FileNotFoundError: the copy, or its checksums, were deleted.
        Damaged: a block is not what was downloaded.
    """
    first, last = offset // BLOCK, -(-(offset + size) // BLOCK)
    data = _read(copy, first * BLOCK, (last - first) * BLOCK)
    wanted = _read(checksums_of(copy), first * _CRC.itemsize, (last - first) * _CRC.itemsize)
    if wanted != _checksums(data):
        raise Damaged(f"{copy}: is not what was downloaded, so it is damaged; delete it and run again")
    return data[offset - first * BLOCK :][:size]


def open_checked(path: Path) -> Path | Ranges:
    """Return what Arrow reads a file from: the path, or for a copy with checksums a stream that deletes a damaged one.

    The stream raises what ``read_checked`` does.
    """
    return Ranges(os.stat(path).st_size, partial(_read_or_delete, path)) if checksums_of(path).is_file() else path


def _read_or_delete(copy: Path, offset: int, size: int) -> bytes:
    try:
        return read_checked(copy, offset, size)
    except Damaged:
        delete_copy(copy)
        raise Damaged(
            f"{copy}: was not what had been downloaded, and was deleted; run the same command to download it again"
        ) from None


def _read(file: Path, offset: int, size: int) -> bytes:
    """Return the bytes of a file from ``offset`` on, fewer at its end."""
    # Opened for each read, so that threads, forks and pickled copies share no handle.
    with file.open("rb", buffering=0) as opened:
        opened.seek(offset)
        data = opened.read(size) or b""
        while len(data) < size and (more := opened.read(size - len(data))):  # a read ends after 2 GiB
            data += more
    return data


def _checksums(data: bytes) -> bytes:
    """Return the checksum of each block of ``data``, which begins with a block, as the file of checksums holds them."""
    blocks = (memoryview(data)[start : start + BLOCK] for start in range(0, len(data), BLOCK))
    return np.array([zlib.crc32(block) for block in blocks], _CRC).tobytes()
