"""Files of Zarr stores on the disk, since zarr renames what it has written without having the system write it there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_cli.stores.files import sync, write_atomically


def write_attributes(group: Path, attributes: Mapping[str, Any]) -> None:
    """Replace the attributes of the group in the folder ``group``; a power cut leaves the old ones or these."""
    file = group / "zarr.json"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    write_atomically(file, json.dumps({**metadata, "attributes": dict(attributes)}, indent=2))


def chunk_file(folder: Path, array: Any, row: int) -> Path:
    """Return the file of the chunk of ``row`` of an array in ``folder``, whose chunks hold whole rows."""
    return folder.joinpath("c", str(row // array.chunks[0]), *["0"] * (array.ndim - 1))


def sync_chunks(folder: Path, array: Any, rows: range) -> None:
    """Have the chunks that hold ``rows`` of an array in ``folder`` on the disk; each holds whole rows."""
    files = {chunk_file(folder, array, row) for row in (*rows[:: array.chunks[0]], *rows[-1:])}
    sync(*files, *{parent for file in files for parent in file.parents if parent.is_relative_to(folder)})
