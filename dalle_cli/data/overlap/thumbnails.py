"""The thumbnails of all of a source's pictures, in a file that grows and is kept."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.overlap.hashes import SIDE, Thumbnails, thumbnail
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress
from dalle_cli.stores.files import explain_os_errors

_BYTES = SIDE * SIDE * 3
_BLOCK = 64
_MADE_BY = "thumbnails 1"
"""Changes when thumbnails do, so that those made before are not taken for new ones."""


@dataclass(frozen=True)
class _Read:
    """Thumbnails of some rows, one behind the other; of a picture that cannot be read, a black one."""

    source: Source
    max_pixels: int

    def __call__(self, rows: range) -> bytes:
        made = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8)
        for place, row in enumerate(rows):
            try:
                made[place] = thumbnail(decode_image(self.source.image_bytes(row), self.max_pixels))
            except (BadSample, BadImage):
                continue
        return made.tobytes()


def read_thumbnails(source: Source, folder: Path, *, max_pixels: int, workers: int) -> Thumbnails:
    """(len(source), SIDE, SIDE, 3), mapped from a file in ``folder``: what it lacks is made and appended.

    The file is named by the source's place and keys. Pictures changed under the same keys are not noticed.

    Raises:
        UserError: the disk is full, or ``folder`` may not be written.
    """
    file = folder / f"{_identity(source)}.thumbnails"
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as out:
            done = out.tell() // _BYTES  # thumbnails are written in order: those that are whole are right
            out.truncate(done * _BYTES)
            with progress("thumbnails", len(source), "pictures", done) as bar:
                blocks = split_blocks(range(done, len(source)), _BLOCK)
                for block, made in zip(blocks, map_blocks(_Read(source, max_pixels), blocks, workers), strict=True):
                    out.write(made)
                    bar.advance(len(block))
    return np.memmap(file, np.uint8, "r", shape=(len(source), SIDE, SIDE, 3))


def _identity(source: Source) -> str:
    known = hashlib.sha256(f"{_MADE_BY}\n{os.path.abspath(source.name)}\n".encode())
    for row in range(len(source)):
        known.update(source.key(row).encode() + b"\n")
    return known.hexdigest()[:32]
