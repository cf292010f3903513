"""Token stores on servers: the same rows and the same training as from a folder here, and damage that is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers.file_server import FileServer, served_as_s3
from helpers.killed_runs import files
from helpers.running import Chain
from helpers.shares import small_files
from helpers.token_stores import write_tokens

from dalle_cli.data import remote
from dalle_cli.data.remote_place import AddressOfStore
from dalle_cli.errors import UserError
from dalle_cli.stores import usable_rows as module
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows
from dalle_cli.views.describe import TokenStoreDescription, describe

FILE, ROWS = 16, 150
LAST = "step-00000012"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr("dalle_cli.data.remote_place.PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "_reached", set())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """Yield a store with several shard files, in the folder that the servers serve."""
    with small_files(FILE):
        yield write_tokens(tmp_path / "served" / "bucket" / "tokens.zarr", ROWS, 6, 40, 2, 16)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    (tmp_path / "served" / "bucket").mkdir(parents=True, exist_ok=True)
    with served_as_s3(tmp_path / "served", monkeypatch) as server:
        yield server


def places(server: FileServer) -> list[AddressOfStore]:
    """Return the address of the store on the web and in a bucket."""
    return [AddressOfStore(f"{server.url}/bucket/tokens.zarr"), AddressOfStore("s3://bucket/tokens.zarr")]


def read_text(place: AddressOfStore) -> None:
    reader = TokenReader(place)
    reader.require_complete()
    reader.read("text", np.array([2 * FILE]))


def test_rows_are_those_of_the_folder(store: Path, server: FileServer) -> None:
    here, rows = TokenReader(store), np.random.default_rng(0).permutation(ROWS)
    for place in places(server):
        there = TokenReader(place)
        there.require_complete()
        assert there.parts == here.parts
        for name in ("text", "text_length", "image", "image_ok", "key", "caption"):
            assert np.array_equal(there.read(name, rows), here.read(name, rows))


def test_show_describes_a_store_there_as_it_does_the_folder(store: Path, server: FileServer, call: Call) -> None:
    here = describe(store)
    for place in places(server):
        assert describe(place) == replace(here, path=str(place))
        shown = call("show", place)
        assert shown.code == 0, shown.err
        assert f"{ROWS}" in shown.out
        for words in (["--yaml"], ["--set", "seed=1"]):
            assert f"{place}: {words[0]} " in call("show", place, *words).mistake()
    assert "s3://bucket/none.zarr: is no token store" in call("show", "s3://bucket/none.zarr").mistake()
    group = json.loads((store / "zarr.json").read_text())
    for part in ("text", "image"):  # as earlier versions wrote them
        del group["attributes"][part]["bytes"]
    (store / "zarr.json").write_text(json.dumps(group))
    (store / "checksums.json").unlink()
    there, here = describe(places(server)[1]), describe(store)
    assert isinstance(there, TokenStoreDescription)
    assert isinstance(here, TokenStoreDescription)
    assert (there.bytes, there.rows) == (None, here.rows)
    assert here.bytes
    assert "not counted" in call("show", places(server)[0]).out


def test_dropped_connections_are_tried_again(
    store: Path, server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.breaks_off = lambda number: number % 3 > 0
    rows = np.arange(ROWS)
    there = TokenReader(places(server)[0])
    assert np.array_equal(there.read("image", rows), TokenReader(store).read("image", rows))
    assert "trying again in 0 s" in capsys.readouterr().err


def test_training_has_the_bytes_of_training_from_a_folder(
    by_hand: Chain, server: FileServer, tmp_path: Path, call: Call
) -> None:
    shutil.copytree(by_hand.tokens, server.folder / "bucket" / "made.zarr")
    for address in (f"{server.url}/bucket/made.zarr", "s3://bucket/made.zarr"):
        assert call("train-prior", by_hand.recipe, "--tokens", address, "--dry-run").code == 0
        done = call("train-prior", by_hand.recipe, "--tokens", f"{address}/", "--out", tmp_path / address[:4])
        assert done.code == 0, done.err
        assert files(tmp_path / address[:4] / LAST) == files(by_hand.prior / LAST)
    done = call("train-clip", by_hand.recipe, "--data", by_hand.train, "--tokens", address, "--out", tmp_path / "clip")
    assert done.code == 0, done.err
    assert files(tmp_path / "clip" / LAST) == files(by_hand.clip / LAST)
    assert files(server.folder / "bucket" / "made.zarr") == files(by_hand.tokens)


def test_usable_rows_come_from_the_stores_file(
    store: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", ROWS)
    place = places(server)[0]
    assert len(usable_rows(TokenReader(place))) == ROWS
    assert not (store / module.FILE).exists()
    usable_rows(TokenReader(store))
    assert (store / module.FILE).is_file()
    monkeypatch.setattr(TokenReader, "usable_bits", lambda self: pytest.fail("the rows are read"))
    assert len(usable_rows(TokenReader(place))) == ROWS


def test_a_missing_file_is_named_at_the_start_where_the_server_lists_files(store: Path, server: FileServer) -> None:
    (store / "image" / "c" / "3" / "0" / "0").unlink()
    (store / "image" / "c" / "3" / "0").rmdir()
    (store / "image" / "c" / "3").rmdir()
    web, bucket = map(TokenReader, places(server))
    with pytest.raises(UserError, match=r"s3://bucket/tokens\.zarr/image/c/3: is missing; copy the store again"):
        bucket.require_complete()
    web.require_complete()
    for reader in (web, bucket):
        with pytest.raises(UserError, match=r"tokens\.zarr/image/c/3/0/0: is missing; copy the store again"):
            reader.read("image", np.array([3 * FILE + 1]))


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("text/c/2/0", b"", r"text/c/2/0: is empty; copy the store again"),
        ("text/c/2/0", b"x" * 400, r"text/c/2/0: is damaged \(.*\); copy the store again"),
        ("text/zarr.json", b"{", r"tokens\.zarr: damaged or missing"),
        ("zarr.json", b"{", r"tokens\.zarr: is no token store"),
        ("checksums.json", b"{}", r"checksums\.json: is damaged"),
        ("checksums.json", b'{\n  "zarr.json": "12"\n}\n', r"zarr\.json: is damaged: its sha256"),
    ],
)
def test_damage_is_named(store: Path, server: FileServer, name: str, content: bytes, found: str) -> None:
    (store / name).write_bytes(content)
    for place in places(server):
        with pytest.raises(UserError, match=found):
            read_text(place)


def test_what_cannot_be_read_or_written_there_is_one_line(server: FileServer, by_hand: Chain, call: Call) -> None:
    def train(address: str) -> str:
        return call("train-prior", by_hand.recipe, "--tokens", address).mistake()

    assert f"{server.url}/bucket/none.zarr: is no token store; make one with" in train(f"{server.url}/bucket/none.zarr")
    assert "hf://datasets/a/b: a token store is not read on the Hub; download it" in train("hf://datasets/a/b")
    assert "ftp://a/b: there are no addresses of the kind ftp://" in train("ftp://a/b")
    server.status = 403
    assert "cannot be read (403 Forbidden" in train("s3://bucket/none.zarr")
    for command in ("tokenize-text", "encode-images"):
        mistake = call(command, by_hand.recipe, "--tokens", "s3://bucket/tokens.zarr").mistake()
        assert "--tokens s3://bucket/tokens.zarr: a token store is written on this machine; name a folder" in mistake
