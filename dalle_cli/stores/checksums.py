"""Checksums of files that no format checks by itself, such as a store's metadata, in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dalle_cli.stores.files import sha256_file, write_json

CHECKSUMS = "checksums.json"
"""Name of the file, which maps names relative to its folder to the SHA-256 of the files."""


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files in ``folder``, unless they are there already."""
    found = {name: sha256_file(folder / name) for name in names}
    file = folder / CHECKSUMS
    if not file.is_file() or file.read_text(encoding="utf-8") != _written(found):
        write_json(file, found)


def damage_in(folder: Path) -> str | None:
    """Return what is wrong with the first file of ``folder`` that is not what its checksum says; None if all are."""
    file = folder / CHECKSUMS
    try:
        text = file.read_text(encoding="utf-8")
        found: dict[str, str] = json.loads(text)
        if text != _written(found):
            return f"{file}: is damaged"
    except FileNotFoundError:
        return f"{file}: is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{file}: is damaged ({error})"
    for name, digest in found.items():
        if not (folder / name).is_file():
            return f"{folder / name}: is missing"
        if sha256_file(folder / name) != digest:
            return f"{folder / name}: is damaged: its sha256 is not that of {file.name}"
    return None


def _written(found: dict[str, str]) -> str:
    """Return the text that ``write_json`` writes."""
    return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
