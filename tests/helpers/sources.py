"""Files of captioned sources, written by hand."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from dalle_cli.data.source import BadSample, Source


def write_files(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files given by their paths below ``root``; return ``root``."""
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body.encode() if isinstance(body, str) else body)
    return root


def write_tar(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    """Write a tar of members, given by name and content or by a header alone; return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
    return path


def contents(source: Source) -> dict[str, tuple[bytes, str]]:
    """Return (image bytes, captions joined by "|", or "BAD" and the reason why there are none) by key."""
    found = {}
    for i in range(len(source)):
        try:
            captions = "|".join(source.captions(i))
        except BadSample as error:
            captions = f"BAD {error}"
        found[source.key(i)] = (source.image_bytes(i), captions)
    assert list(found) == sorted(found)
    assert len(found) == len(source)
    return found
