"""Tests of the file that keeps the usable rows of a large store."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.shares import make, small_files
from helpers.token_stores import write_tokens

from dalle_cli.stores import usable_rows as module
from dalle_cli.stores.checksums import CHECKSUMS
from dalle_cli.stores.shards import Part, Shard
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import FILE, known_usable_rows, usable_rows

ROWS = 100


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with small_files(16):
        path = write_tokens(tmp_path / "tokens.zarr", ROWS, 8, 400, 4, 16)
        monkeypatch.setattr(module, "LARGE", ROWS)
        arrays = zarr.open_group(str(path), mode="r+")
        some = np.random.default_rng(0).random((2, ROWS)) < 0.7
        arrays["text_length"][:], arrays["image_ok"][:] = 8 * some[0], some[1]
        yield path


def reading(store: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """Return the usable rows of a store, and the number of shards that were read to find them."""
    reader, read = TokenReader(store), []
    real = TokenReader._read_rows
    monkeypatch.setattr(TokenReader, "_read_rows", lambda self, *at: read.append(at) or real(self, *at))
    rows = list(usable_rows(reader))
    monkeypatch.setattr(TokenReader, "_read_rows", real)
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


@pytest.mark.parametrize("parts", [("text", "image"), ("image", "text")])
def test_the_command_that_completes_a_store_keeps_them(
    parts: tuple[Part, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "made.zarr"
    monkeypatch.setattr(module, "LARGE", ROWS // 4)
    with small_files():
        make(path, parts[0], ROWS)
        make(path, parts[1], ROWS, Shard(1, 2))
        assert not (path / FILE).exists()
        assert known_usable_rows(TokenReader(path)) is None  # which would read a store from end to end
        make(path, parts[1], ROWS, Shard(2, 2))
        assert (path / FILE).exists()
        assert reading(path, monkeypatch) == ([row for row in range(ROWS) if row % 5 != 2], 0)
        (path / FILE).unlink()  # the command was killed before it kept them
        assert known_usable_rows(TokenReader(path)) is None
        make(path, parts[0], ROWS)
        assert (path / FILE).exists()


def test_a_store_of_an_earlier_version_has_them_still(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of such a store do not hold the size of their files, nor did the hash of what it keeps."""
    group = zarr.open_group(str(store), mode="r+")
    for part in ("text", "image"):
        group.attrs.put(
            {**group.attrs, part: {name: value for name, value in group.attrs[part].items() if name != "bytes"}}
        )
    reader = TokenReader(store)
    states = {
        part: {name: value for name, value in asdict(state).items() if name != "bytes"}
        for part, state in sorted(reader.parts.items())
    }
    made_of = hashlib.sha256(json.dumps(states, sort_keys=True, default=str).encode())
    made_of.update((store / CHECKSUMS).read_bytes())
    bits = np.zeros(-(-ROWS // 8), np.uint8)
    bits[0] = 0b101
    line = json.dumps({"made_of": made_of.hexdigest(), "crc32": zlib.crc32(bits.tobytes())}).encode() + b"\n"
    (store / FILE).write_bytes(line + bits.tobytes())
    assert reading(store, monkeypatch) == ([0, 2], 0)


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
    monkeypatch.setattr(module, "LARGE", ROWS + 1)
    (store / FILE).unlink()
    assert reading(store, monkeypatch)[0] == rows
    assert not (store / FILE).exists()
