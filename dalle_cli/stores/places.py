"""Places that a token store is read from: a folder of this machine, or one on a server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias


class RemotePlace(Protocol):
    """A file or folder on a server; it begins with the part of ``Path`` that it has in common with that."""

    def __truediv__(self, name: str, /) -> Self: ...

    def is_file(self) -> bool: ...

    def read_bytes(self) -> bytes: ...

    def zarr(self) -> Any:
        """Return the Zarr store in this folder, for reading; a chunk that is missing is an error there."""
        ...

    def names(self) -> set[str] | None:
        """Return the names of the files and folders in this folder; None if its server does not list them."""
        ...


Place: TypeAlias = Path | RemotePlace


def names_in(folder: Place) -> set[str] | None:
    """Return the names of the files and folders in a folder; see ``RemotePlace.names``."""
    if not isinstance(folder, Path):
        return folder.names()
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
