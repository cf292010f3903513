"""A record of what is on the disk, since a power cut takes all that was not synced."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest


class Disk:
    """Records what is synced, by the number of the file or folder on the disk: its content, or the names in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._synced: dict[int, object] = {}
        fsync = os.fsync

        def record(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._synced[path.stat().st_ino] = _content(path)

        monkeypatch.setattr(os, "fsync", record)

    def lacks(self, folder: Path) -> list[str]:
        """Return the files below ``folder`` whose content is not on the disk, and the names that are not there."""
        lost = []
        for path in folder.rglob("*"):
            if path.name.endswith("lock"):
                continue
            if path.is_file() and self._synced.get(path.stat().st_ino) != _content(path):
                lost.append(f"content of {path.relative_to(folder)}")
            names = self._synced.get(path.parent.stat().st_ino)
            if not isinstance(names, dict) or names.get(path.name) != path.stat().st_ino:
                lost.append(f"name of {path.relative_to(folder)}")
        return lost


def _content(path: Path) -> object:
    if path.is_dir():
        return {entry.name: entry.stat().st_ino for entry in os.scandir(path)}
    return sha256(path.read_bytes()).hexdigest()
