"""The rows of a token store that training can use, those with both a caption and a picture.

A large store keeps them in a file, a bit for each row, since finding them reads two arrays from end to end. The file is
made where it is missing, damaged or of other parts, so a store may be copied with or without it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.stores.checksums import CHECKSUMS
from dalle_cli.stores.files import write_atomically
from dalle_cli.stores.row_set import BLOCK, RowSet
from dalle_cli.stores.tokens import TokenReader

FILE = "usable-rows.bits"
"""Name of the file: a line of JSON, then the bits."""
SMALLEST = 64 * BLOCK
"""Number of rows from which on a store has the file."""


def usable_rows(reader: TokenReader, *, keep: bool = True) -> RowSet:
    """Return the rows that hold both a caption and a picture; a large store of both parts keeps them if ``keep``."""
    if len(reader) < SMALLEST or not all(state.complete for state in reader.parts.values()):
        return RowSet(reader.usable_bits())
    file, head = reader.path / FILE, _head(reader)
    bits = _read(file, head, len(reader))
    if bits is None:
        bits = reader.usable_bits()
        if keep and _read(file, head, len(reader)) is None:  # another rank may have been faster
            with suppress(OSError, UserError):  # the folder may not be written to
                write_atomically(file, _line(head, bits) + bits.tobytes())
    return RowSet(bits)


def _head(reader: TokenReader) -> str:
    """Return a hash of what the parts were made of, and of which samples they skipped."""
    parts = {part: asdict(state) for part, state in sorted(reader.parts.items())}
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    with suppress(OSError):
        found.update((reader.path / CHECKSUMS).read_bytes())
    return found.hexdigest()


def _line(head: str, bits: np.ndarray) -> bytes:
    return json.dumps({"made_of": head, "crc32": zlib.crc32(bits.tobytes())}).encode() + b"\n"


def _read(file: Path, head: str, rows: int) -> np.ndarray | None:
    """Return the bits in ``file``, or None if it is not there or not what was written for these parts."""
    try:
        line, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    bits = np.frombuffer(body, np.uint8)
    return bits if len(bits) == -(-rows // 8) and line + b"\n" == _line(head, bits) else None
