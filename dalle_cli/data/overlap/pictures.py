"""The distinct pictures of a source, found by their thumbnails."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.index import HASH_BYTES, group_by_hash
from dalle_cli.data.overlap.hashes import Hashes, Thumbnails, comparable, hashes
from dalle_cli.data.overlap.thumbnails import ThumbnailFiles, read_thumbnails
from dalle_cli.data.source import Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress

_BLOCK = 128
MARKS = np.dtype([("digest", "<u8", HASH_BYTES // 8), ("hash", "<u8"), ("comparable", "?")])

Marks = NDArray[Any]
"""(n,) of what tells thumbnails apart: a digest of all pixels, the perceptual hash, and whether it can be compared."""


@dataclass(frozen=True)
class UniquePictures:
    """The distinct comparable pictures of a source, each by the first of the rows with an equal thumbnail."""

    thumbnails: Thumbnails | ThumbnailFiles
    """(n, SIDE, SIDE, 3) thumbnails of all rows of the source."""
    rows: NDArray[np.int64]
    """(m,) row of each distinct picture."""
    picture_of_row: NDArray[np.int64]
    """(n,) index in ``rows`` of each row's picture; -1 where a row cannot be compared."""
    hashes: Hashes
    """(m,) hash of each distinct picture."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def incomparable(self) -> int:
        return int((self.picture_of_row < 0).sum())

    def thumbnails_of(self, pictures: NDArray[np.int64] | range) -> Thumbnails:
        """Return the thumbnails of pictures given by their indices in ``rows``."""
        own = self.rows[pictures.start : pictures.stop] if isinstance(pictures, range) else self.rows[pictures]
        return self.thumbnails[own]


def read_pictures(source: Source, cache: Path, *, max_pixels: int, workers: int) -> UniquePictures:
    """Read the source's thumbnails and group equal ones.

    Raises:
        UserError: see ``read_thumbnails``.
    """
    thumbnails = read_thumbnails(source, cache, max_pixels=max_pixels, workers=workers)
    return distinct_pictures(thumbnails, mark_rows(thumbnails, range(len(thumbnails)), workers))


@dataclass(frozen=True)
class _Marker:
    thumbnails: Thumbnails | ThumbnailFiles

    def __call__(self, block: range) -> Marks:
        part = self.thumbnails[block.start : block.stop]
        digests = b"".join(blake2b(picture, digest_size=HASH_BYTES).digest() for picture in part)
        marks = np.empty(len(block), MARKS)
        marks["digest"] = np.frombuffer(digests, "<u8").reshape(len(block), -1)
        marks["hash"] = hashes(part)
        marks["comparable"] = comparable(part)
        return marks


def mark_rows(thumbnails: Thumbnails | ThumbnailFiles, rows: range, workers: int) -> Marks:
    """Return the marks of some rows, (len(rows),)."""
    marks = np.empty(len(rows), MARKS)
    with progress("overlap: hashes", len(rows), "pictures") as bar:
        blocks = split_blocks(rows, _BLOCK)
        for block, made in zip(blocks, map_blocks(_Marker(thumbnails), blocks, workers), strict=True):
            marks[block.start - rows.start : block.stop - rows.start] = made
            bar.advance(len(block))
    return marks


def distinct_pictures(thumbnails: Thumbnails | ThumbnailFiles, marks: Marks) -> UniquePictures:
    """Group the rows with equal thumbnails, by the marks of all rows."""
    items, offsets = group_by_hash(marks["digest"].tobytes())
    first_rows = items[offsets[:-1]]
    usable_groups = marks["comparable"][first_rows]
    picture_of_row = np.empty(len(thumbnails), dtype=np.int64)
    picture_of_group = np.where(usable_groups, np.cumsum(usable_groups) - 1, -1)
    picture_of_row[items] = np.repeat(picture_of_group, np.diff(offsets))
    rows = first_rows[usable_groups]
    return UniquePictures(thumbnails, rows, picture_of_row, marks["hash"][rows])
