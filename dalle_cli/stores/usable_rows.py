"""The rows of a token store that training can use, those with both a caption and a picture.

A large store keeps them in a file, a bit for each row, since finding them reads two arrays from end to end. The command
that completes the store makes the file. It is made anew where it is missing, damaged or of other parts, so a store may
be copied with or without it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dalle_cli.progress import log
from dalle_cli.stores.checksums import CHECKSUMS
from dalle_cli.stores.row_set import LARGE, RowSet, keep_bits, read_bits
from dalle_cli.stores.tokens import TokenReader

FILE = "usable-rows.bits"
"""Name of the file."""


def usable_rows(reader: TokenReader, *, keep: bool = True) -> RowSet:
    """Return the rows that hold both a caption and a picture; a large store of both parts keeps them if ``keep``."""
    known = known_usable_rows(reader)
    if known is not None:
        return known
    bits = reader.usable_bits()
    file = reader.path / FILE
    # Another rank may have been faster. A store on a server is not written to, so its file is not fetched once more.
    if keep and isinstance(file, Path) and _is_complete(reader) and known_usable_rows(reader) is None:
        keep_bits(file, _made_of(reader), bits)
    return RowSet(bits)


def known_usable_rows(reader: TokenReader) -> RowSet | None:
    """Return the usable rows of a small store, or those that a large one keeps; None if it does not keep them yet."""
    if len(reader) < LARGE:
        return RowSet(reader.usable_bits())
    bits = read_bits(reader.path / FILE, _made_of(reader), len(reader)) if _is_complete(reader) else None
    return None if bits is None else RowSet(bits)


def keep_usable_rows(reader: TokenReader) -> None:
    """Have a store that is large and complete keep its usable rows."""
    file = reader.path / FILE
    if isinstance(file, Path) and len(reader) >= LARGE and _is_complete(reader) and known_usable_rows(reader) is None:
        log(f"{reader.path}: is complete; counting the rows that training can use")
        keep_bits(file, _made_of(reader), reader.usable_bits())


def _is_complete(reader: TokenReader) -> bool:
    return len(reader.parts) == 2 and all(state.complete for state in reader.parts.values())


def _made_of(reader: TokenReader) -> str:
    """Return a hash of what the parts were made of, and of which samples they skipped."""
    parts = {
        part: {name: value for name, value in asdict(state).items() if value is not None}
        for part, state in sorted(reader.parts.items())
    }
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    with suppress(OSError):
        found.update((reader.path / CHECKSUMS).read_bytes())
    return found.hexdigest()
