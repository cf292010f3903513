"""Sources at addresses: by ranges over HTTP and S3, with dropped connections and refusals, and on the Hub."""

from __future__ import annotations

import io
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Call
from fsspec.implementations.memory import MemoryFileSystem
from helpers.file_server import FileServer, served_as_s3
from helpers.pictures import noise
from helpers.sources import write_tar

from dalle_cli.config.schema import DataSettings
from dalle_cli.data import read_ahead, remote, servers
from dalle_cli.data.download import CACHE, CACHE_GB
from dalle_cli.data.exclude import SourceWithExclusions
from dalle_cli.data.open_source import open_source, open_sources
from dalle_cli.data.picture_loader import TrainingPictures, consecutive_pictures
from dalle_cli.data.read_ahead import rows_ahead
from dalle_cli.data.remote import GAP, RemoteFile, merged
from dalle_cli.data.scan import scan
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError
from dalle_cli.stores.png import encode_png
from dalle_cli.stores.row_set import RowSet

SAMPLES = 12


def png_of(seed: int) -> bytes:
    return encode_png(np.asarray(noise(40, 40, seed)))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for i in range(shard, SAMPLES, 2):
            members += [(f"{i:03d}.png", png_of(i)), (f"{i:03d}.txt", f"noise {i}".encode())]
        write_tar(tmp_path / "served" / f"train-{shard:05d}.tar", *members)
    return tmp_path / "served"


@pytest.fixture
def server(shards: Path) -> Iterator[FileServer]:
    server = FileServer(shards)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "_reached", set())
    for name in (CACHE, CACHE_GB):
        monkeypatch.delenv(name, raising=False)


def contents(source: Source) -> list[tuple[str, list[str], bytes]]:
    return [(source.key(i), source.captions(i), source.image_bytes(i)) for i in range(len(source))]


def test_shards_are_the_same_over_http_and_only_ranges_are_read(shards: Path, server: FileServer) -> None:
    local = open_source(shards)
    for spec in (f"{server.url}/", server.url, f"{server.url}/train-{{00000..00001}}.tar", f"{server.url}/moved"):
        found = open_source(spec)
        assert contents(found) == contents(local)
        assert found.identity == local.identity
    read = server.ranges_of(".tar")
    assert read
    assert None not in read


def test_names_are_quoted_as_in_addresses(shards: Path, server: FileServer) -> None:
    tar = (shards / "train-00000.tar").read_bytes()
    (shards / "x ü").mkdir()
    for name, quoted in (("a b.tar", "a%20b.tar"), ("50%25.tar", "50%2525.tar"), ("é.tar", "%C3%A9.tar")):
        (shards / "x ü" / name).write_bytes(tar)
        assert RemoteFile(f"{server.url}/x%20%C3%BC/{quoted}?signed=1&more=2").read(100, 900) == tar[100:1000]
        assert server.requests[-1].path == f"/x%20%C3%BC/{quoted}?signed=1&more=2"
    for folder in ("x%20%C3%BC", "x ü", "x%20%C3%BC?signed=1"):
        found = remote.files_at(f"{server.url}/{folder}", (".tar",))
        assert [file.read(0, 700) for file in found] == [tar[:700]] * 3


def test_dropped_connections_are_tried_again(
    shards: Path, server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.breaks_off = lambda number: number % 3 > 0
    assert contents(open_source(f"{server.url}/train-{{00000..00001}}.tar")) == contents(open_source(shards))
    assert "trying again in 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 401, 403, 405, 408, 429, 500, 503])
def test_a_refusal_is_one_line(server: FileServer, call: Call, status: int) -> None:
    found = open_source(server.url)
    server.status, before = status, len(server.requests)
    with pytest.raises(
        UserError, match=rf"train-0000.\.tar: cannot be read \(.*{status}.*look at the network"
    ) as mistake:
        found.image_bytes(0)
    assert "\n" not in str(mistake.value)
    tries = 4 if status in (408, 429, 500, 503) else 1
    assert len(server.requests) == before + tries
    assert "cannot be read" in call("scan", f"{server.url}/train-00000.tar").mistake()


def test_what_is_not_there_is_named(server: FileServer, call: Call) -> None:
    assert "nothing.tar: no such file" in call("scan", f"{server.url}/nothing.tar").mistake()
    assert "holds neither .tar shards nor Parquet" in call("scan", f"{server.url}/nowhere").mistake()
    away = FileServer(server.folder)
    away.stop()
    assert "(error sending request: Connection refused); look" in call("scan", f"{away.url}/a.tar").mistake()
    with pytest.raises(
        UserError, match=r"no addresses of the kind nosuch://; name a path, or one of https://, http://, s3"
    ):
        open_source("nosuch://bucket/a.tar")


def test_a_server_that_is_no_good_for_ranges_is_named(server: FileServer) -> None:
    file = RemoteFile(f"{server.url}/train-00000.tar")
    server.ranges = False
    with pytest.raises(
        UserError, match=r"0\.tar: cannot be read \(its server sends whole files alone\); .*DALLE_CACHE"
    ):
        file.read(5, 10)
    server.ranges, server.lengths = True, False
    with pytest.raises(
        UserError, match=r"0\.tar: cannot be read \(its server does not say how large it is\); download it"
    ):
        file.size()


def test_a_server_that_falls_silent_is_given_up(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_SILENCE", timedelta(seconds=0.2))
    server.silent = True
    with pytest.raises(
        UserError, match=r"train-00000\.tar: cannot be read \(its server fell silent\); look at the network"
    ):
        RemoteFile(f"{server.url}/train-00000.tar").read(0, 1000)


def test_versions_are_told_apart(shards: Path, server: FileServer) -> None:
    file = RemoteFile(f"{server.url}/train-00000.tar")
    size = (shards / "train-00000.tar").stat().st_size
    first = file.state()
    assert first.size == size
    assert first.mark
    server.etag = '"a1"'
    assert file.state() == (size, "a1")
    server.heads = False
    assert file.state() == (size, "a1")


def test_ranges_that_lie_near_are_read_as_one(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, gap = random.Random(0), 20
    monkeypatch.setattr(remote, "GAP", gap)
    for _ in range(300):
        ranges = [(rng.randrange(20 * gap), rng.choice([0, 1, gap // 2, gap])) for _ in range(rng.randrange(1, 12))]
        wanted = np.zeros(25 * gap, bool)
        for offset, size in ranges:
            wanted[offset : offset + size] = True
        for offset, size in ranges:  # whatever lies between two ranges, if it is short
            nearest = min((other for other, length in ranges if length and other >= offset + size), default=None)
            if size and nearest is not None and nearest - offset - size <= gap:
                wanted[offset:nearest] = True
        edges = np.flatnonzero(np.diff(wanted.astype(np.int8), prepend=0, append=0))
        assert merged(ranges) == list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    monkeypatch.undo()
    large = rng.randbytes(4 * GAP)
    (server.folder / "large").write_bytes(large)
    ranges = [(10, 5), (3 * GAP, 100), (0, 20), (7, 0), (GAP, 30), (3 * GAP + 50, 400)]
    found = RemoteFile(f"{server.url}/large").read_many(ranges)
    assert found == [large[offset : offset + size] for offset, size in ranges]
    assert sorted(filter(None, server.ranges_of("large"))) == [
        f"bytes=0-{GAP + 29}",
        f"bytes={3 * GAP}-{3 * GAP + 449}",
    ]


@pytest.mark.parametrize("what", ["captions", "images", "both"])
def test_samples_in_order_take_few_requests(
    shards: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: read_ahead.What
) -> None:
    local, found = open_source(shards), open_source(server.url)

    def read(source: Source, rows: Sequence[int]) -> list[Any]:
        got: list[Any] = []
        for row in rows_ahead(source, rows, what):
            got.append(source.captions(row) if what != "images" else None)
            got.append(source.image_bytes(row) if what != "captions" else None)
        return got

    before = len(server.requests)
    assert read(found, range(SAMPLES)) == read(local, range(SAMPLES))
    assert len(server.requests) - before == 2  # one for each shard
    mixed = [5, 0, 11, 5, 7, 2]
    assert read(found, mixed) == read(local, mixed)
    monkeypatch.setattr(read_ahead, "PIECE", 3 * len(png_of(0)))  # several pieces a shard
    before = len(server.requests)
    assert read(found, range(SAMPLES)) == read(local, range(SAMPLES))
    assert 4 <= len(server.requests) - before <= 2 * SAMPLES
    assert not remote._held
    (tmp_path / "left-out.txt").write_text(f"0/{local.key(3)}\n")
    joined = SourceWithExclusions(open_sources([server.url, str(shards)]), tmp_path / "left-out.txt")
    rows = [row for row in range(2 * SAMPLES) if row != 3]
    assert read(joined, rows) == read(open_sources([str(shards), str(shards)]), rows)


def test_rows_without_bytes_to_fetch_are_not_waited_for(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    copied = open_source(server.url)
    endless = itertools.cycle(range(SAMPLES))
    assert list(itertools.islice(rows_ahead(copied, endless, "images"), 20)) == [*range(SAMPLES), *range(8)]


def test_worker_processes_read_from_servers(shards: Path, server: FileServer) -> None:
    """They start afresh: in a fork of this process, which has read from the server, obstore would wait for ever."""
    source, local = open_source(server.url), open_source(shards)
    settings = {"image_size": 32, "data": DataSettings(), "seed": 0}
    pictures = TrainingPictures(source, RowSet.full(SAMPLES), batch_size=4, flip=False, workers=1, **settings)  # type: ignore[arg-type]
    alone = TrainingPictures(local, RowSet.full(SAMPLES), batch_size=4, flip=False, workers=0, **settings)  # type: ignore[arg-type]
    for ours, theirs in zip(pictures.batches(0, 6), alone.batches(0, 6), strict=True):
        np.testing.assert_array_equal(ours.pictures, theirs.pictures)
    blocks = consecutive_pictures(source, range(SAMPLES), block=5, workers=1, **settings)  # type: ignore[arg-type]
    plain = consecutive_pictures(local, range(SAMPLES), block=5, workers=0, **settings)  # type: ignore[arg-type]
    for block, other in zip(blocks, plain, strict=True):
        assert block.keys == other.keys
        np.testing.assert_array_equal(block.pictures, other.pictures)
    counted = scan(source, DataSettings(), 32, workers=2)
    assert (counted.samples, counted.usable) == (SAMPLES, SAMPLES)
    server.status = 403
    with pytest.raises(UserError, match=r"^http://127.*: cannot be read \(.*403"):
        list(pictures.batches(0, 6))


def test_a_fork_that_reads_fails_at_once(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    open_source(server.url)
    monkeypatch.setattr(servers, "_runs_in", 1)
    servers._server.cache_clear()
    with pytest.raises(RuntimeError, match="start the process afresh"):
        open_source(server.url)


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serve a bucket of S3, ``bucket``, with the shards in its folder ``set/data``."""
    (shards.parent / "s3" / "bucket" / "set").mkdir(parents=True)
    shards.rename(shards.parent / "s3" / "bucket" / "set" / "data")
    with served_as_s3(shards.parent / "s3", monkeypatch) as server:
        yield server


def test_shards_in_a_bucket(bucket: FileServer) -> None:
    folder = bucket.folder / "bucket" / "set" / "data"
    (folder / "below").mkdir()
    (folder / "below" / "train-00009.tar").write_bytes(b"")
    local = open_source(f"{folder}/train-{{00000..00001}}.tar")
    found = open_source("s3://bucket/set")
    assert contents(found) == contents(local)
    assert not [each for each in bucket.requests if each.method == "HEAD"]  # the list says how large files are
    for spec in ("s3://bucket/set/data/", "s3://bucket/set/data/train-{00000..00001}.tar"):
        again = open_source(spec)
        assert contents(again) == contents(local)
        assert again.identity == local.identity == found.identity
    with pytest.raises(UserError, match=r"s3://bucket/nothing: holds neither \.tar shards nor Parquet"):
        open_source("s3://bucket/nothing")


def test_credentials_are_named(bucket: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.status = 403
    with pytest.raises(UserError, match=r"s3://bucket/a\.tar: cannot be read .*credentials \(AWS_ACCESS_KEY_ID"):
        open_source("s3://bucket/a.tar")
    bucket.status = None
    for name in ("AWS_SKIP_SIGNATURE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    nobody = FileServer(bucket.folder)
    nobody.stop()
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", nobody.url)
    servers._server.cache_clear()
    with pytest.raises(UserError, match=r"cannot be read \(no credentials found\); .*credentials \(AWS_ACCESS_KEY_ID"):
        open_source("s3://bucket/a.tar")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UserError, match=r"az://box: .*Account must be specified; .*\(AZURE_STORAGE_ACCOUNT_NAME"):
        open_source("az://box/a.tar")


class Hub(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory in place of the Hub's."""

    protocol = "hf"
    store: dict[str, Any] = {}  # noqa: RUF012  # fsspec's own way
    pseudo_dirs = [""]  # noqa: RUF012


@pytest.fixture
def hub(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **_: Hub() if protocol == "hf" else None)
    servers._server.cache_clear()
    Hub.store.clear()
    return Hub()


def test_shards_on_the_hub(hub: Hub, shards: Path) -> None:
    for tar in shards.glob("*.tar"):
        hub.pipe_file(f"/datasets/me/set/data/{tar.name}", tar.read_bytes())
    assert contents(open_source("hf://datasets/me/set")) == contents(open_source(shards))


def test_parquet_on_the_hub_is_downloaded_split_by_split(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    for split in ("train", "test"):
        images = [{"bytes": png_of(i), "path": f"{split}-{i}.png"} for i in range(3)]
        table, file = pa.table({"image": images, "caption": [f"{split} {i}" for i in range(3)]}), io.BytesIO()
        pq.write_table(table, file)
        hub.pipe_file(f"/datasets/me/set/data/{split}-00000-of-00001.parquet", file.getvalue())
    train = open_source("hf://datasets/me/set")
    assert [train.captions(i) for i in range(3)] == [["train 0"], ["train 1"], ["train 2"]]
    assert [file.name for file in (tmp_path / "cache").rglob("*.parquet")] == ["train-00000-of-00001.parquet"]
    test = open_source("hf://datasets/me/set:test")
    assert [test.captions(i) for i in range(3)] == [["test 0"], ["test 1"], ["test 2"]]
    with pytest.raises(UserError, match=r"has no split other \(its splits: test, train\)"):
        open_source("hf://datasets/me/set:other")


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.tar", "obstore"), ("hf://datasets/a/b", "fsspec")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, address: str, package: str) -> None:
    servers._server.cache_clear()
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{package}.*; pip install 'dalle-toolchain\[remote\]'"):
        open_source(address)
