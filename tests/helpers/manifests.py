"""Changing the manifest of a checkpoint as one who means it would: with the right checksum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_cli.stores.checkpoint import manifest_checksum


def change_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Let ``change`` edit the manifest of a checkpoint, and write it again."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
