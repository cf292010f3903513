"""Writing a rendered world of captioned pictures as WebDataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.data.workers import available_cores, map_blocks, split_blocks
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.stores.files import explain_os_errors, owned, rename_synced

ROWS_PER_SHARD = 1000
"""Number of pictures in a tar."""


class Row(NamedTuple):
    """A picture (size, size, 3), the facts that it shows, in types that JSON has, and its caption."""

    facts: dict[str, Any]
    picture: NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class World:
    """A kind of world and how its rows are made."""

    kind: str
    version: int
    row: Callable[[int, str, int, int], Row]
    """Makes the row of (seed, split, index, size)."""
    multiple: int
    """Divisor of a picture's side in pixels."""
    facts: Mapping[str, object]
    """Further entries of world.json."""


@dataclass(frozen=True)
class WrittenWorld:
    """Number of pictures written now, and of pictures in shards that existed already."""

    written: int
    existing: int


@dataclass(frozen=True)
class _Shard:
    path: Path
    split: str
    indices: range


def write_world(world: World, out: Path, n: int, test_n: int, seed: int, size: int = 64) -> WrittenWorld:
    """Write ``n`` training pictures and two test splits of ``test_n`` as OUT/SPLIT/KIND-00000.tar ..., and world.json.

    A row consists of KEY.png, KEY.txt (the caption) and KEY.json (the facts). Its content depends on (seed, split,
    row) only, not on the number of rows. A shard gets its name when it is complete, so a killed run can be resumed.

    Raises:
        UserError: a setting is impossible, or the folder is neither new nor empty and does not hold the same world.
    """
    with explain_os_errors(out), owned(out):
        return _write_world(world, out, n, test_n, seed, size)


def _write_world(world: World, out: Path, n: int, test_n: int, seed: int, size: int) -> WrittenWorld:
    _check(n, test_n, world.multiple, seed, size)
    rows = {"train": n, "seen": test_n, "heldout": test_n}
    about = {"kind": world.kind, "version": world.version, "seed": seed, "size": size, "rows": rows}
    _claim_folder(out, {**about, "shard_rows": ROWS_PER_SHARD, **world.facts})
    shards = [
        _Shard(out / split / f"{world.kind}-{number:05d}.tar", split, range(count)[start : start + ROWS_PER_SHARD])
        for split, count in rows.items()
        for number, start in enumerate(range(0, count, ROWS_PER_SHARD))
    ]
    missing = [shard for shard in shards if not shard.path.exists()]
    total = n + 2 * test_n
    existing = total - sum(len(shard.indices) for shard in missing)
    with progress("make-shapes", total, "pictures", existing) as bar:
        write = partial(_write_shards, world, missing, seed, size)
        for written in map_blocks(write, split_blocks(range(len(missing)), 1), available_cores(), "start it again"):
            bar.advance(written)
    return WrittenWorld(written=total - existing, existing=existing)


def _check(n: int, test_n: int, multiple: int, seed: int, size: int) -> None:
    if size < 32 or size % multiple:
        raise UserError(f"size {size}: the pictures' side must be a multiple of {multiple} and at least 32")
    for name, value, least in (("n", n, 1), ("test_n", test_n, 0), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} {value}: must be at least {least}")


def _claim_folder(out: Path, settings: dict[str, object]) -> None:
    """Write world.json into ``out``, or check that it holds these settings."""
    world = out / "world.json"
    if world.exists():
        try:
            found = json.loads(world.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{world} is not a world's settings: give another folder, or delete this one")
        different = [key for key in sorted({*settings, *found}) if settings.get(key) != found.get(key)]
        if different:
            key = different[0]
            raise UserError(
                f"{out} holds another {settings['kind']} world (its {key} is {found.get(key)!r}, not "
                f"{settings.get(key)!r}): give another folder, or delete this one"
            )
        return
    # A writer that was killed at its start leaves its unfinished world.json.
    if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".world.json") for entry in out.iterdir())):
        raise UserError(
            f"{out} exists and holds no {settings['kind']} world (no world.json): give a new or empty folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_then_rename(world, (json.dumps(settings, indent=2) + "\n").encode())


def _write_then_rename(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(data)
    rename_synced(beside, path)


def _write_shards(world: World, shards: Sequence[_Shard], seed: int, size: int, block: range) -> int:
    """Write those of ``shards`` that are in ``block``; return the number of their pictures."""
    for i in block:
        _write_shard(world, shards[i], seed, size)
    return sum(len(shards[i].indices) for i in block)


def _write_shard(world: World, shard: _Shard, seed: int, size: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in shard.indices:
            for suffix, data in _members(world.row(seed, shard.split, index, size)):
                header = tarfile.TarInfo(f"{index:08d}.{suffix}")  # its mtime, uid and gid are 0
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    shard.path.parent.mkdir(exist_ok=True)
    _write_then_rename(shard.path, buffer.getvalue())


def _members(row: Row) -> list[tuple[str, bytes]]:
    """Return the (extension, content) of each file of a row."""
    png = io.BytesIO()
    Image.fromarray(row.picture).save(png, "PNG", compress_level=1)
    return [("json", json.dumps(row.facts).encode()), ("png", png.getvalue()), ("txt", row.caption.encode())]
