#!/usr/bin/env python3
"""Compare how fast a token store opens and feeds batches with a plain memory map of the same rows.

    scripts/bench/store.py --rows 1000000 --rounds 5 --json

Makes a store of the paper's sizes (256 text and 32 x 32 image tokens a row) and two .npy files of the same values, and
reads by turns, in one process:

- epoch: all batches of an epoch in training's order, with a cache of one window, as training reads;
- anywhere: as many batches of rows drawn from the whole store, with the reader's own cache, of a million rows;
- uncached: a few of those with the cache of one window, which is the worst that can be asked of the store.

Each round begins with an empty cache of decoded shards; the system's cache of files is warm for all. Rates are rows a
second, medians over the rounds, of wall time and of CPU time (which a busy machine does not change much).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dalle_cli.data.batch_order import WINDOW, BatchOrder
from dalle_cli.stores.tokens import CACHED_ROWS, ROWS_PER_SHARD, PartWriter, TokenReader

TEXT, TEXT_VOCAB, GRID, IMAGE_VOCAB = 256, 16384, 32, 8192
OPENINGS = 20


def synthetic_rows(n: int, seed: int) -> dict[str, np.ndarray]:
    """``n`` rows as uneven as real ones: image tokens of about 12 bits, captions of about 24 tokens."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, IMAGE_VOCAB + 1) ** 0.7
    shares = np.diff(np.round(np.cumsum(weights / weights.sum()) * 2**16), prepend=0).astype(int)
    table = np.repeat(np.random.default_rng(0).permutation(IMAGE_VOCAB), shares).astype(np.uint16)
    lengths = np.clip(rng.gamma(3, 8, n), 3, TEXT).astype(np.uint16)
    text = np.zeros((n, TEXT), np.uint16)
    used = np.arange(TEXT) < lengths[:, None]
    text[used] = rng.zipf(1.3, int(used.sum())) % TEXT_VOCAB
    image = table[rng.integers(2**16, size=(n, GRID, GRID), dtype=np.uint16)]
    return {"text": text, "text_length": lengths, "image": image, "image_ok": np.ones(n, np.uint8)}


def make(folder: Path, rows: int) -> tuple[Path, dict[str, np.ndarray]]:
    """The store, and memory maps of its two large arrays, in ``folder``; found again if they were made before."""
    store, made = folder / "tokens.zarr", folder / f"made-{rows}"
    shapes = {"text": (rows, TEXT), "image": (rows, GRID, GRID)}
    if not made.exists():
        plain = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint16, shape)
            for name, shape in shapes.items()
        }
        for part, names in (("text", ("text", "text_length")), ("image", ("image", "image_ok"))):
            writer = PartWriter(store, part, {"rows": rows})
            for start in range(writer.rows, rows, ROWS_PER_SHARD):
                stop = min(start + ROWS_PER_SHARD, rows)
                values = synthetic_rows(stop - start, start)
                writer.append([f"{row:09d}" for row in range(start, stop)], {n: values[n] for n in names}, {})
                plain[part][start:stop] = values[part]
            writer.finish()
        made.touch()
    return store, {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds on the clock, and of the CPU."""

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    cpu_before, before = cpu(), time.perf_counter()
    work()
    return time.perf_counter() - before, cpu() - cpu_before


def main() -> None:
    """Parse the command line, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--uncached", type=int, default=4, help="batches of the worst kind a round [4]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to make the store, or find it made; 6 GB for a million rows")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir and given.dir.parent) as temporary:
        folder = given.dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        store, plain = make(folder, given.rows)
        found = bench(store, plain, given)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.rows} rows of {TEXT} + {GRID * GRID} uint16, batches of {given.batch}, medians of {given.rounds}")
    for name, value in found.items():
        print(f"{name.replace('_', ' '):44} {value:>14,}")


def bench(store: Path, plain: dict[str, np.ndarray], given: argparse.Namespace) -> dict[str, float]:
    """Measure opening, reading of usable rows and batches, by turns with the memory map."""
    openings = [measure(lambda: len(TokenReader(store))) for _ in range(OPENINGS)]
    usable = [measure(lambda: TokenReader(store).usable()) for _ in range(3)]
    rows = TokenReader(store).usable()
    order = BatchOrder(rows, given.batch, seed=0)
    epoch = [order.batch(step)[0] for step in range(len(rows) // given.batch)]
    rng = np.random.default_rng(0)
    anywhere = [rng.integers(len(rows), size=given.batch) for _ in epoch]
    kinds = {
        "epoch": (epoch, WINDOW),
        "anywhere": (anywhere, CACHED_ROWS),
        "uncached": (anywhere[: given.uncached], WINDOW),
    }
    decoded: dict[str, int] = {}

    def from_store(kind: str) -> None:
        batches, cached_rows = kinds[kind]
        reader = TokenReader(store, cached_rows)
        for batch in batches:
            for name in plain:
                reader.read(name, batch)
        decoded[kind] = reader.cached_bytes

    def from_map(kind: str) -> None:
        for batch in kinds[kind][0]:
            for values in plain.values():
                values[batch]

    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        for kind in kinds:
            times.setdefault(f"{kind}_store", []).append(measure(lambda kind=kind: from_store(kind)))  # type: ignore[misc]
            times.setdefault(f"{kind}_memmap", []).append(measure(lambda kind=kind: from_map(kind)))  # type: ignore[misc]

    def median(values: list[tuple[float, float]], which: int) -> float:
        return statistics.median(value[which] for value in values)

    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    found: dict[str, float] = {
        "rows": len(rows),
        "open_seconds": round(median(openings, 0), 5),
        "usable_rows_seconds": round(median(usable, 0), 5),
        "store_bytes": size,
        "memmap_bytes": sum(values.nbytes for values in plain.values()),
    }
    for kind, (batches, _) in kinds.items():
        count = sum(map(len, batches))
        for which, unit in enumerate(("second", "cpu_second")):
            for reader in ("store", "memmap"):
                found[f"{kind}_{reader}_rows_per_{unit}"] = round(count / median(times[f"{kind}_{reader}"], which))
        found[f"{kind}_decoded_bytes"] = decoded[kind]
    return found


if __name__ == "__main__":
    main()
