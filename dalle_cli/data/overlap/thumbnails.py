"""Cache files of the thumbnails of all pictures of a source."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.overlap.hashes import SIDE, Thumbnails, thumbnail
from dalle_cli.data.read_ahead import on_server, rows_ahead
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.stores.files import explain_os_errors, owned

_RECORD = np.dtype([("picture", "u1", (SIDE, SIDE, 3)), ("crc32", "<u4")])
"""A thumbnail in a file, with its checksum."""
_BLOCK = 64
_VERSION = "thumbnails 2"
"""Version of the files; one made by another version is not used. Version 1 had no checksums."""


class ThumbnailFiles:
    """The thumbnails in files, of which only those that are asked for are read.

    A memory map would be simpler, but the pages that it has read count as this process's memory.
    """

    def __init__(self, files: list[tuple[Path, int]]) -> None:
        """Take files and the number of thumbnails in each; the rows of a file follow those of the file before."""
        self._files = [file for file, _ in files]
        self._begins = np.cumsum([0, *(count for _, count in files)])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Thumbnails:
        """Return the thumbnails of some rows, in their order; the files are read in ascending order.

        Raises:
            UserError: a file was shortened, is damaged or is gone.
        """
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        distinct, place = np.unique(wanted, return_inverse=True)
        found = np.empty((len(distinct), SIDE, SIDE, 3), np.uint8)
        bounds = np.searchsorted(distinct, self._begins)
        for file, begin, start, stop in zip(self._files, self._begins[:-1], bounds[:-1], bounds[1:], strict=True):
            if start < stop:
                _read(file, distinct[start:stop] - begin, found[start:stop])
        return found[place]


def _read(file: Path, rows: NDArray[np.int64], into: Thumbnails) -> None:
    """Read ascending rows of a file, those that follow one another at once."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    if not file.is_file():
        raise UserError(f"{file}: is gone; run the command that made it again")
    with explain_os_errors(file), file.open("rb") as opened:
        for start, stop in zip(starts, np.append(starts[1:], len(rows)), strict=True):
            opened.seek(int(rows[start]) * _RECORD.itemsize)
            content = opened.read(int(stop - start) * _RECORD.itemsize)
            if len(content) != (stop - start) * _RECORD.itemsize:
                raise UserError(f"{file}: is shorter than it was; delete it and run again")
            records = np.frombuffer(content, _RECORD)
            into[start:stop] = records["picture"]
            if _checksums(into[start:stop]) != records["crc32"].tolist():
                raise UserError(f"{file}: is damaged; delete it and run again")


def _checksums(thumbnails: Thumbnails) -> list[int]:
    return [zlib.crc32(picture) for picture in np.ascontiguousarray(thumbnails)]


def records_of(thumbnails: Thumbnails) -> bytes:
    """Return thumbnails (n, SIDE, SIDE, 3) uint8 as a file holds them."""
    records = np.empty(len(thumbnails), _RECORD)
    records["picture"], records["crc32"] = thumbnails, _checksums(thumbnails)
    return records.tobytes()


@dataclass(frozen=True)
class _ThumbnailReader:
    """Makes the thumbnails of rows, as a file holds them; a picture that cannot be read is black."""

    source: Source
    max_pixels: int

    def __call__(self, rows: range) -> bytes:
        thumbnails = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8)
        for place, row in enumerate(rows_ahead(self.source, rows, "images")):
            try:
                thumbnails[place] = thumbnail(decode_image(self.source.image_bytes(row), self.max_pixels))
            except (BadSample, BadImage):
                continue
        return records_of(thumbnails)


def read_thumbnails(source: Source, folder: Path, *, max_pixels: int, workers: int) -> ThumbnailFiles:
    """Return the source's thumbnails, in a file in ``folder`` to which missing ones are appended.

    The file is named by a hash of the source's identity and keys.

    Raises:
        UserError: the disk is full, or ``folder`` cannot be written.
    """
    file = folder / f"{source_hash(source)}.thumbnails"
    make_thumbnails(source, range(len(source)), file, max_pixels=max_pixels, workers=workers)
    return ThumbnailFiles([(file, len(source))])


def make_thumbnails(source: Source, rows: range, file: Path, *, max_pixels: int, workers: int) -> None:
    """Append the thumbnails of those of ``rows`` that ``file`` lacks."""
    with explain_os_errors(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        with owned(file), file.open("ab") as out:
            done = out.tell() // _RECORD.itemsize  # they are appended in order, and checked when they are read
            out.truncate(done * _RECORD.itemsize)
            with progress("thumbnails", len(rows), "pictures", done) as bar:
                blocks = split_blocks(rows[done:], _BLOCK)
                made = map_blocks(_ThumbnailReader(source, max_pixels), blocks, workers, afresh=on_server(source))
                for block, thumbnails in zip(blocks, made, strict=True):
                    out.write(thumbnails)
                    bar.advance(len(block))


def source_hash(source: Source) -> str:
    """Return a hash of the source's identity and keys, which names its files."""
    digest = hashlib.sha256(f"{_VERSION}\n{source.identity}\n".encode())
    for row in range(len(source)):
        digest.update(source.key(row).encode() + b"\n")
    return digest.hexdigest()[:32]
