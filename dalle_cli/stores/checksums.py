"""Checksums of files that no format checks by itself, such as a store's metadata, in a file beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dalle_cli.errors import UserError
from dalle_cli.stores.files import json_text, sha256_file, write_json
from dalle_cli.stores.places import Place

CHECKSUMS = "checksums.json"
"""Name of the file, which maps names relative to its folder to the SHA-256 of the files."""


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files in ``folder``, unless they are there already."""
    found = {name: sha256_file(folder / name) for name in names}
    file = folder / CHECKSUMS
    if not file.is_file() or file.read_text(encoding="utf-8") != json_text(found):
        write_json(file, found)


def require_undamaged(folder: Place) -> None:
    """Raise UserError if a file of ``folder`` is not what its checksum says, or if there are no checksums."""
    if (damage := _damage_in(folder)) is not None:
        raise UserError(f"{damage}; copy {folder} again, or run the command that made it again")


def _damage_in(folder: Place) -> str | None:
    file = folder / CHECKSUMS
    try:
        text = file.read_bytes().decode()
        found = json.loads(text)
        if not isinstance(found, dict) or not found or text != json_text(found):
            return f"{file}: is damaged"
    except FileNotFoundError:
        return f"{file}: is missing"
    except (OSError, ValueError) as error:
        return f"{file}: is damaged ({error})"
    for name, digest in found.items():
        if not (folder / name).is_file():
            return f"{folder / name}: is missing"
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            return f"{folder / name}: is damaged: its sha256 is not that of {CHECKSUMS}"
    return None
