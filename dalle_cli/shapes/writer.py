"""Writing a rendered world of captioned pictures as WebDataset tars."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.errors import UserError


class Row(NamedTuple):
    """What a row holds: its facts for JSON, its picture (size, size, 3) uint8, its caption."""

    facts: dict[str, Any]
    picture: NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class World:
    """A kind of world, and how a row of it is made from (seed, split, index, size) alone, in any process."""

    kind: str
    version: int
    """Raised when the same seed gives other bytes."""
    row: Callable[[int, str, int, int], Row]
    multiple: int
    """A picture's side is a multiple of so many pixels."""
    facts: Mapping[str, object]
    """What world.json says besides."""


@dataclass(frozen=True)
class _Shard:
    path: str
    world: World
    seed: int
    split: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class MadeWorld:
    """What `write_world` did: pictures written now, and pictures in shards that were already in place."""

    out: Path
    written: int
    kept: int


def write_world(
    world: World,
    out: str | Path,
    n: int,
    test_n: int,
    seed: int,
    size: int = 64,
    shard_rows: int = 1000,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> MadeWorld:
    """Write `n` training and 2 x `test_n` test pictures: OUT/SPLIT/KIND-00000.tar, ..., OUT/world.json.

    A row is KEY.png, KEY.txt (the caption) and KEY.json (the facts); its content depends on (seed, split, row)
    only, never on how many there are. A shard appears under its name only when whole, so a killed run goes on
    where it was. `progress(done, total)` is called with picture counts after each shard; `workers` processes
    share the shards. UserError for impossible settings and for a folder that holds anything else.
    """
    _check(n, test_n, world.multiple, seed, size, shard_rows, workers)
    out = Path(out)
    rows = {"train": n, "seen": test_n, "heldout": test_n}
    about = {"kind": world.kind, "version": world.version, "seed": seed, "size": size, "rows": rows}
    _claim_folder(out, {**about, "shard_rows": shard_rows, **world.facts})
    shards = [
        _Shard(
            str(out / split / f"{world.kind}-{number:05d}.tar"),
            world,
            seed,
            split,
            start,
            min(start + shard_rows, count),
            size,
        )
        for split, count in rows.items()
        for number, start in enumerate(range(0, count, shard_rows))
    ]
    todo = [shard for shard in shards if not Path(shard.path).exists()]
    total = sum(shard.stop - shard.start for shard in shards)
    kept = done = total - sum(shard.stop - shard.start for shard in todo)
    if progress is not None:
        progress(done, total)
    if workers == 1 or len(todo) < 2:
        for shard in todo:
            done += _write_shard(shard)
            if progress is not None:
                progress(done, total)
    else:
        # Fresh processes rather than forks: the caller may hold threads (torch) that a fork would break.
        with ProcessPoolExecutor(min(workers, len(todo)), multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(_write_shard, shard) for shard in todo]):
                done += future.result()
                if progress is not None:
                    progress(done, total)
    return MadeWorld(out, written=total - kept, kept=kept)


def _check(n: int, test_n: int, multiple: int, seed: int, size: int, shard_rows: int, workers: int) -> None:
    if size < 32 or size % multiple:
        raise UserError(f"size {size}: the pictures' side must be a multiple of {multiple} and at least 32")
    for name, value, least in (
        ("n", n, 1),
        ("test_n", test_n, 0),
        ("seed", seed, 0),
        ("shard_rows", shard_rows, 1),
        ("workers", workers, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: must be at least {least}")


def _claim_folder(out: Path, settings: dict[str, object]) -> None:
    """Put world.json into `out`, or check that the one there says the same."""
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
                f"{out} holds another {settings['kind']} world (its {key} is {found.get(key)!r}, asked for is "
                f"{settings.get(key)!r}): give another folder, or delete this one"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out} is there and holds no {settings['kind']} world (no world.json): give a new or empty folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    _write_then_rename(world, (json.dumps(settings, indent=2) + "\n").encode())


def _write_then_rename(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _write_shard(shard: _Shard) -> int:
    """Write one shard whole; returns its number of pictures."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(shard.start, shard.stop):
            for suffix, data in _files(shard, index):
                header = tarfile.TarInfo(f"{index:08d}.{suffix}")  # its mtime, uid and gid are 0
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    path = Path(shard.path)
    path.parent.mkdir(exist_ok=True)
    _write_then_rename(path, buffer.getvalue())
    return shard.stop - shard.start


def _files(shard: _Shard, index: int) -> list[tuple[str, bytes]]:
    row = shard.world.row(shard.seed, shard.split, index, shard.size)
    png = io.BytesIO()
    Image.fromarray(row.picture).save(png, "PNG", compress_level=1)
    return [("json", json.dumps(row.facts).encode()), ("png", png.getvalue()), ("txt", row.caption.encode())]
