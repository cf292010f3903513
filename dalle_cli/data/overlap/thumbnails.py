"""A cache file of the thumbnails of all pictures of a source."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.overlap.hashes import SIDE, Thumbnails, thumbnail
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress
from dalle_cli.stores.files import explain_os_errors, owned

_BYTES = SIDE * SIDE * 3
_BLOCK = 64
_VERSION = "thumbnails 1"
"""Version of the thumbnails; a file made by another version is not used."""


@dataclass(frozen=True)
class _ThumbnailReader:
    """Makes the thumbnails of rows, as bytes; a picture that cannot be read is black."""

    source: Source
    max_pixels: int

    def __call__(self, rows: range) -> bytes:
        thumbnails = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8)
        for place, row in enumerate(rows):
            try:
                thumbnails[place] = thumbnail(decode_image(self.source.image_bytes(row), self.max_pixels))
            except (BadSample, BadImage):
                continue
        return thumbnails.tobytes()


def read_thumbnails(source: Source, folder: Path, *, max_pixels: int, workers: int) -> Thumbnails:
    """Return the source's thumbnails, memory-mapped from a file in ``folder`` to which missing ones are appended.

    The file is named by a hash of the source's identity and keys.

    Raises:
        UserError: the disk is full, or ``folder`` cannot be written.
    """
    file = folder / f"{_source_hash(source)}.thumbnails"
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with owned(file), file.open("ab") as out:
            done = out.tell() // _BYTES  # thumbnails are appended in order, so all whole ones are valid
            out.truncate(done * _BYTES)
            with progress("thumbnails", len(source), "pictures", done) as bar:
                blocks = split_blocks(range(done, len(source)), _BLOCK)
                made = map_blocks(_ThumbnailReader(source, max_pixels), blocks, workers)
                for block, thumbnails in zip(blocks, made, strict=True):
                    out.write(thumbnails)
                    bar.advance(len(block))
    return np.memmap(file, np.uint8, "r", shape=(len(source), SIDE, SIDE, 3))


def _source_hash(source: Source) -> str:
    digest = hashlib.sha256(f"{_VERSION}\n{source.identity}\n".encode())
    for row in range(len(source)):
        digest.update(source.key(row).encode() + b"\n")
    return digest.hexdigest()[:32]
