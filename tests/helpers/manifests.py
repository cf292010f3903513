"""Changing the manifest of a checkpoint as one who means it would: with the right checksum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_cli.stores.checkpoint import manifest_checksum
from dalle_cli.stores.files import write_json


def change_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` edit the manifest of a checkpoint, and write it again."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    write_json(file, {**manifest, "checksum": manifest_checksum(manifest)})
