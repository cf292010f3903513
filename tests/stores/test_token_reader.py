"""Reading a token store in training's order: right, each shard decoded once, in a stated memory, ahead of its use."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.shares import small_files, small_windows
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.data.batch_order import WINDOW, BatchOrder
from dalle_cli.data.prefetch import prefetch
from dalle_cli.stores import tokens
from dalle_cli.stores.row_set import BLOCK
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import CACHED_ROWS, TokenReader, caption_turns
from dalle_cli.stores.usable_rows import usable_rows

FILE, ROWS, TEXT, GRID = 16, 400, 3, 2
ROW_BYTES = 2 * TEXT + 2 + 2 * GRID * GRID + 1
"""Bytes of a row of text, text_length, image and image_ok."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    values = {
        "text": rng.integers(2**16, size=(ROWS, TEXT), dtype=np.uint16),
        "text_length": rng.integers(0, TEXT + 1, ROWS).astype(np.uint16),
        "image": rng.integers(2**16, size=(ROWS, GRID, GRID), dtype=np.uint16),
        "image_ok": (rng.random(ROWS) < 0.9).astype(np.uint8),
    }
    path = tmp_path_factory.mktemp("reader") / "tokens.zarr"
    with small_files(FILE):
        for part, names in (("text", ("text", "text_length")), ("image", ("image", "image_ok"))):
            with PartWriter(path, part, {}, ROWS) as writer:  # type: ignore[arg-type]
                while rows := writer.todo[:FILE]:
                    block = {name: values[name][rows.start : rows.stop] for name in names}
                    writer.append([str(row) for row in rows], block, {})
                writer.finish()
    return path, values


class Counted:
    """A Zarr array that notes which rows are read from it."""

    def __init__(self, array: object, name: str, read: Counter[tuple[str, int]]) -> None:
        self.array, self.name, self.read = array, name, read

    def __getattr__(self, name: str) -> object:
        return getattr(self.array, name)

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        assert at[0].stop - at[0].start == FILE
        self.read[self.name, at[0].start // FILE] += 1
        return self.array[at]  # type: ignore[index, no-any-return]


def counted(reader: TokenReader) -> Counter[tuple[str, int]]:
    read: Counter[tuple[str, int]] = Counter()
    reader.arrays = {name: Counted(array, name, read) for name, array in reader.arrays.items()}
    return read


@given(st.lists(st.lists(st.integers(0, ROWS - 1), max_size=40), max_size=6), st.sampled_from([0, 20, 100, 1000]))
@settings(max_examples=30)
def test_any_rows_in_any_order_within_the_stated_memory(
    store: tuple[Path, dict[str, np.ndarray]], batches: list[list[int]], cached: int
) -> None:
    path, values = store
    with small_files(FILE):
        reader = TokenReader(path, cached)
        assert reader.cache_limit == max(cached, FILE) * (ROW_BYTES + reader.arrays["key"].dtype.itemsize)
        for batch in batches:
            rows = np.array(batch, dtype=np.int64)
            for name in ("text", "image", "text_length"):
                np.testing.assert_array_equal(reader.read(name, rows), values[name][rows])
                assert reader.cached_bytes == sum(shard.nbytes for shard in reader._cache.values())
                assert reader.cached_bytes <= max(reader.cache_limit, FILE * 2 * GRID * GRID)


def test_an_epoch_in_training_order_decodes_each_shard_once(store: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Also where rows are left out, so that a window of so many usable rows would be wider than the cache."""
    path, values = store
    window = 5 * FILE
    with small_files(FILE), small_windows(FILE, 5):
        reader = TokenReader(path, cached_rows=window)
        rows = usable_rows(reader)
        np.testing.assert_array_equal(rows, np.flatnonzero((values["text_length"] > 0) & (values["image_ok"] > 0)))
        assert len(rows) < 0.8 * ROWS
        read = counted(reader)
        batches, size = BatchOrder(rows, 6, seed=3), 6
        seen = []
        for step in range(len(rows) // size):
            batch, _ = batches.batch(step)
            seen += batch.tolist()
            np.testing.assert_array_equal(reader.read("image", batch), values["image"][batch])
            reader.read("text", batch)
            reader.read("text_length", batch)
        straddling = ROWS // window  # a batch on a window's border may need a shard of the old one again
        assert set(read) == {
            (name, shard) for name in ("image", "text", "text_length") for shard in range(ROWS // FILE)
        }
        assert sum(read.values()) <= len(read) + straddling * 2
    count = len(rows) // (ROWS // window)
    for first in (0, len(rows) // 2):
        assert len({row // FILE for row in seen[first : first + count]}) <= 10  # two windows at the most


def test_what_is_at_hand_is_used_before_it_is_let_go(store: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, _ = store
    with small_files(FILE):
        reader = TokenReader(path)
        reader.cache_limit = 4 * FILE * 2 * TEXT  # four shards of text, and every read asks for five
        read = counted(reader)
        rows = np.arange(5) * FILE
        for _ in range(10):
            reader.read("text", rows)
        assert sum(read.values()) <= 5 + 9 * 2  # the least recently used of five would always be missing


def test_the_sizes_in_the_documentation_are_true() -> None:
    assert BLOCK == tokens.ROWS_PER_BLOCK
    assert WINDOW == 64 * BLOCK
    assert CACHED_ROWS >= 10**6
    row = 2 * 1024 + 2 * 256
    assert row / 1000 == pytest.approx(2.6, abs=0.05)


def test_threads_may_read_at_the_same_time(store: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, values = store
    failures: list[BaseException] = []
    with small_files(FILE):
        reader = TokenReader(path, cached_rows=2 * FILE)

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(30):
                    rows = rng.integers(ROWS, size=20)
                    np.testing.assert_array_equal(reader.read("image", rows), values["image"][rows])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert reader.cached_bytes == sum(shard.nbytes for shard in reader._cache.values()) <= reader.cache_limit


# The thread that reads ahead


def test_items_come_in_order_and_no_more_are_made_than_said() -> None:
    made = []

    def items() -> Iterator[int]:
        for item in range(20):
            made.append(item)
            yield item

    taken = []
    for item in prefetch(items(), 3):
        time.sleep(0.002)
        taken.append(item)
        assert len(made) <= len(taken) + 3 + 1  # and the one in the making
    assert taken == made == list(range(20))


def test_they_are_made_while_others_are_in_use() -> None:
    started = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        started.set()
        yield 1

    found = prefetch(items(), 1)
    assert next(found) == 0
    assert started.wait(10)  # nobody has asked for it
    assert list(found) == [1]


def test_an_error_stands_where_its_item_would() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    found = prefetch(items(), 4)
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)


def test_a_closed_reader_ends_its_thread() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            ended.set()

    found = prefetch(items(), 2)
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert ended.wait(10)


def test_each_caption_takes_its_turn_and_an_epoch_has_all_kinds() -> None:
    rows, counts = np.repeat(np.arange(3000), 6), np.full(18000, 3)
    epochs = np.tile(np.arange(6), 3000)
    turns = caption_turns(rows, epochs, counts).reshape(3000, 6)
    for three in (turns[:, :3], turns[:, 3:]):
        np.testing.assert_array_equal(np.sort(three), np.tile(np.arange(3), (3000, 1)))
    shares = np.stack([(turns == kind).mean(axis=0) for kind in range(3)])
    assert np.abs(shares - 1 / 3).max() < 5 * math.sqrt(2 / 9 / 3000)  # five standard deviations
    # Two captions and two views, which alternate, come in all four pairs.
    epochs = np.tile(np.arange(40), 100)
    turns = caption_turns(np.repeat(np.arange(100), 40), epochs, np.full(4000, 2))
    pairs = np.bincount(2 * turns + epochs % 2, minlength=4)
    assert np.abs(pairs - 1000).max() < 5 * math.sqrt(1000)


def test_one_caption_is_shown_in_every_epoch() -> None:
    assert not caption_turns(np.arange(5), np.arange(5), np.ones(5, np.int64)).any()
