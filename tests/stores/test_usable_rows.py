"""Tests of the file that keeps the usable rows of a large store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.shares import small_files
from helpers.token_stores import write_tokens

from dalle_cli.stores import usable_rows as module
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import FILE, usable_rows

ROWS = 100


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(module, "SMALLEST", ROWS)
    with small_files(16):
        path = write_tokens(tmp_path / "tokens.zarr", ROWS, 8, 400, 4, 16)
        arrays = zarr.open_group(str(path), mode="r+")
        some = np.random.default_rng(0).random((2, ROWS)) < 0.7
        arrays["text_length"][:], arrays["image_ok"][:] = 8 * some[0], some[1]
        yield path


def reading(store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """Return the usable rows of a store, and the number of shards that were read to find them."""
    reader, read = TokenReader(store), []
    real = TokenReader._read_shard
    monkeypatch.setattr(TokenReader, "_read_shard", lambda self, *at: read.append(at) or real(self, *at))
    rows = list(usable_rows(reader))
    monkeypatch.setattr(TokenReader, "_read_shard", real)
    return rows, len(read)


def test_usable_rows_are_found_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, whole = (TokenReader(store).read(name, np.arange(ROWS)) for name in ("text_length", "image_ok"))
    wanted = np.flatnonzero((lengths > 0) & (whole > 0))
    rows, read = reading(store, monkeypatch)
    assert rows == wanted.tolist()
    assert 20 < len(rows) < 80
    assert read == 2 * 7
    assert reading(store, monkeypatch) == (rows, 0)


def test_what_only_looks_writes_nothing(store: Path) -> None:
    usable_rows(TokenReader(store), keep=False)
    assert not (store / FILE).exists()


def damaged(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def foreign(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"made_of": "', b'"made_of": "0', 1))


@pytest.mark.parametrize("harm", [damaged, cut, foreign, Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_file_that_is_not_the_stores_is_made_anew(store: Path, harm: object, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = reading(store, monkeypatch)
    harm(store / FILE)  # type: ignore[operator]
    assert reading(store, monkeypatch) == (rows, 2 * 7)
    assert reading(store, monkeypatch) == (rows, 0)


def test_a_copy_takes_the_file_along_and_a_small_store_has_none(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = reading(store, monkeypatch)
    shutil.copytree(store, store.with_name("copy.zarr"))
    assert reading(store.with_name("copy.zarr"), monkeypatch) == (rows, 0)
    monkeypatch.setattr(module, "SMALLEST", ROWS + 1)
    (store / FILE).unlink()
    assert reading(store, monkeypatch)[0] == rows
    assert not (store / FILE).exists()
