"""Sources at addresses: by ranges over HTTP, with dropped connections, from a cache, and in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Call
from helpers.pictures import noise
from helpers.sources import write_tar

from dalle_cli.config.schema import DataSettings
from dalle_cli.data import remote
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures
from dalle_cli.data.remote import CACHE, RemoteFile
from dalle_cli.errors import UserError
from dalle_cli.stores.png import encode_png
from dalle_cli.stores.row_set import RowSet

SAMPLES = 12


@dataclass
class Server:
    """A web server of a folder that serves ranges; it drops connections, or answers with an error, if it is told to."""

    folder: Path
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and range of each request."""
    flaky: bool = False
    broken: bool = False

    def __post_init__(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(self.folder)))
        self.http.asked = self  # type: ignore[attr-defined]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Server = self.server.asked  # type: ignore[attr-defined]
        wanted = self.headers.get("Range")
        server.requests.append((self.command, self.path, wanted))
        if server.flaky and len(server.requests) % 3:  # twice, since the client itself tries once more
            self.close_connection = True
            self.connection.close()
            return
        if server.broken:
            self.send_error(503, "out of order")
            return
        if wanted is None:
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(word) for word in wanted.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


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
def server(shards: Path) -> Iterator[Server]:
    server = Server(shards)
    yield server
    server.http.shutdown()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.delenv(CACHE, raising=False)


def contents(source: Any) -> list[tuple[str, list[str], bytes]]:
    return [(source.key(i), source.captions(i), source.image_bytes(i)) for i in range(len(source))]


def test_shards_are_the_same_over_http_and_only_ranges_are_read(shards: Path, server: Server) -> None:
    local = open_source(shards)
    for spec in (f"{server.url}/", server.url, f"{server.url}/train-{{00000..00001}}.tar"):
        found = open_source(spec)
        assert contents(found) == contents(local)
        assert found.identity == local.identity
    read = [wanted for method, path, wanted in server.requests if method == "GET" and path.endswith(".tar")]
    assert read
    assert None not in read


def test_dropped_connections_are_tried_again(shards: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.flaky = True
    assert contents(open_source(server.url)) == contents(open_source(shards))
    assert "trying again in 0 s" in capsys.readouterr().err


def test_a_server_out_of_order_is_one_line(server: Server, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_source(server.url)
    server.broken = True
    with pytest.raises(UserError, match=r"train-0000.\.tar: cannot be read \(503.*look at the network"):
        found.image_bytes(0)
    mistake = call("scan", f"{server.url}/train-00000.tar").mistake()
    assert "cannot be read" in mistake
    server.broken = False
    assert "nothing.tar: no such file" in call("scan", f"{server.url}/nothing.tar").mistake()


def test_a_cache_holds_whole_files_and_goes_on_with_half_a_download(
    shards: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "READ_AHEAD", 1000)
    real, reads = RemoteFile.read, []

    def read(file: RemoteFile, offset: int, size: int) -> bytes:
        reads.append(offset)
        if len(reads) == 5:
            raise UserError("cut off")
        return real(file, offset, size)

    monkeypatch.setattr(RemoteFile, "read", read)
    with pytest.raises(UserError, match="cut off"):
        open_source(server.url)
    assert contents(open_source(server.url)) == contents(open_source(shards))
    assert reads[:6] == [0, 1000, 2000, 3000, 4000, 4000]
    done = len(reads)
    assert contents(open_source(server.url)) == contents(open_source(shards))
    assert len(reads) == done
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_workers_read_over_http(server: Server) -> None:
    source = open_source(server.url)
    pictures = TrainingPictures(source, RowSet.full(SAMPLES), 32, DataSettings(), 0, 4, flip=False, workers=1)
    alone = TrainingPictures(source, RowSet.full(SAMPLES), 32, DataSettings(), 0, 4, flip=False, workers=0)
    for ours, theirs in zip(pictures.batches(0, 6), alone.batches(0, 6), strict=True):
        np.testing.assert_array_equal(ours.pictures, theirs.pictures)
    server.broken = True
    with pytest.raises(UserError, match=r"^http://127.*: cannot be read \(503"):
        list(pictures.batches(0, 6))


def test_parquet_at_an_address_is_downloaded_split_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for split in ("train", "test"):
        images = [{"bytes": png_of(i), "path": f"{split}-{i}.png"} for i in range(3)]
        table = pa.table({"image": images, "caption": [f"{split} {i}" for i in range(3)]})
        with memory.open(f"/set-{tmp_path.name}/data/{split}-00000-of-00001.parquet", "wb") as file:
            pq.write_table(table, file)
    train = open_source(f"memory://set-{tmp_path.name}")
    assert [train.captions(i) for i in range(3)] == [["train 0"], ["train 1"], ["train 2"]]
    assert [file.name for file in (tmp_path / "cache").rglob("*.parquet")] == ["train-00000-of-00001.parquet"]
    test = open_source(f"memory://set-{tmp_path.name}:test")
    assert [test.captions(i) for i in range(3)] == [["test 0"], ["test 1"], ["test 2"]]
    with pytest.raises(UserError, match=r"has no split other \(its splits: test, train\)"):
        open_source(f"memory://set-{tmp_path.name}:other")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"holds neither \.tar shards nor Parquet"):
        open_source("memory://nothing-here")
    with pytest.raises(UserError, match="nosuch"):
        open_source("nosuch://bucket/a.tar")

    def without(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", without)
    with pytest.raises(UserError, match=r"s3://bucket: Install s3fs.*pip install 'dalle-toolchain\[remote\]'"):
        open_source("s3://bucket/a.tar")
