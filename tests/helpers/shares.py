"""A token store whose values are a function of the row, written in small shard files.

    python shares.py STORE SAMPLES PART SHARD

writes one share of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from dalle_cli.data import batch_order
from dalle_cli.stores import row_set, token_writer, tokens
from dalle_cli.stores.shards import WHOLE, Part, Shard, parse_shard
from dalle_cli.stores.token_writer import PartWriter

FILE = 4
"""Number of rows of a shard file."""
IDENTITY = {"source": "shapes", "seed": 0}


@contextmanager
def small_files(rows: int = FILE, most: int = tokens.MOST_SHARDS) -> Iterator[None]:
    """Make stores in shard files of ``rows`` rows, or of several times as many if there would be more than ``most``."""
    with (
        mock.patch.multiple(tokens, ROWS_PER_BLOCK=rows, ROWS_PER_CHUNK=rows // 2, MOST_SHARDS=most),
        mock.patch.multiple(token_writer, ROWS_PER_BLOCK=rows, ROWS_PER_CHUNK=rows // 2),
    ):
        yield


@contextmanager
def small_windows(block: int, blocks: int) -> Iterator[None]:
    """Shuffle ``blocks`` blocks of ``block`` rows, a multiple of 8, among each other in a window."""
    with (
        mock.patch.multiple(row_set, BLOCK=block, CHUNK=4 * block),
        mock.patch.multiple(batch_order, BLOCK=block, WINDOW_BLOCKS=blocks, WINDOW=block * blocks),
    ):
        yield


def key(row: int) -> str:
    return f"key-{row}"


def arrays(part: Part, rows: range) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, int]]:
    """Return values, skips and counts of ``rows``, a function of their numbers: some are skipped, some files empty."""
    skipped = {key(row): f"reason {row % 3}" for row in rows if row % 5 == 2}
    counts = {"captions": len(rows), "odd": sum(row % 2 for row in rows)}
    ok = np.array([row % 5 != 2 for row in rows])
    if part == "image":
        filled = [row // FILE % 3 != 1 for row in rows]  # every third file holds nothing but zeros
        image = np.array([[[row, row + 1], [7, 9]] for row in rows], np.uint16) * ok[:, None, None]
        return {"image": image * np.array(filled)[:, None, None], "image_ok": ok.astype(np.uint8)}, skipped, counts
    found = {
        "text": np.array([[row, 3, 5] for row in rows], np.uint16) * ok[:, None],
        "text_length": ok.astype(np.uint16) * 3,
        "caption": np.array([f"caption {row} ☃" * (row % 3) for row in rows], dtype=object),
    }
    versions = max(row // FILE % 4 for row in rows)  # as with captions: files differ in how many a picture has
    if versions:
        found["text_epochs"] = np.array([[[row, v, 1] for v in range(1, versions + 1)] for row in rows], np.uint16)
        found["text_epochs_length"] = np.full((len(rows), versions), 3, np.uint16)
        found["text_versions"] = np.full(len(rows), versions, np.uint16)
    return found, skipped, counts


def make(
    store: Path,
    part: Part,
    samples: int,
    shard: Shard = WHOLE,
    until: int | None = None,
    identity: Mapping[str, Any] = IDENTITY,
    prefix: str = "key-",
) -> PartWriter:
    """Write a share of ``part``, or its rows before ``until``; keys begin with ``prefix``."""
    with PartWriter(store, part, identity, samples, shard) as writer:
        while rows := writer.todo[: writer.rows_per_shard]:
            if until is not None and rows.start >= until:
                return writer
            found, skipped, counts = arrays(part, rows)
            writer.append([f"{prefix}{row}" for row in rows], found, skipped, counts)
        writer.finish()
    return writer


def files(store: Path) -> dict[str, bytes]:
    """Return the bytes of every file in a folder."""
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


if __name__ == "__main__":
    with small_files():
        make(Path(sys.argv[1]), sys.argv[3], int(sys.argv[2]), parse_shard(sys.argv[4]))  # type: ignore[arg-type]
