"""Copies of files on servers: downloads that break off go on, and the least recently used copies make room."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Call
from helpers.file_server import FileServer
from helpers.sources import contents, write_tar

from dalle_cli.data import remote, servers
from dalle_cli.data.copy_checksums import BLOCK, checksums_of, keep_checksums
from dalle_cli.data.download import CACHE, CACHE_GB, NoRoom, local_copies
from dalle_cli.data.formats.webdataset import WebDatasetSource
from dalle_cli.data.open_source import open_source, tar_shards
from dalle_cli.data.remote import RemoteFile
from dalle_cli.errors import UserError

SIZE = 200_000


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(CACHE_GB, raising=False)
    (tmp_path / "served").mkdir()
    server = FileServer(tmp_path / "served")
    for number in range(5):
        (server.folder / f"{number}.tar").write_bytes(content(number))
    yield server
    server.stop()


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def files(server: FileServer, *numbers: int) -> list[RemoteFile]:
    return [RemoteFile(f"{server.url}/{number}.tar") for number in numbers]


def there(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))


def test_a_download_that_broke_off_goes_on(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "CHUNK", 1000)
    server.breaks_off = lambda number: number % 3 > 0
    (copy,) = local_copies(files(server, 0))
    assert copy.read_bytes() == content(0)
    starts = [int(each.removeprefix("bytes=").partition("-")[0]) for each in server.ranges_of(".tar") if each]
    assert any(0 < start < SIZE for start in starts)
    server.breaks_off, done = lambda number: False, len(server.requests)
    assert local_copies(files(server, 0)) == [copy]
    assert len(server.requests) == done
    state = files(server, 1)[0].state()
    version = hashlib.sha256(state.mark.encode()).hexdigest()[:8]
    # Processes that were killed left both, one of them before the file was replaced on the server.
    (copy.parent / f"1.tar.{SIZE}.{version}.partial").write_bytes(content(1)[:150_000])
    (copy.parent / f"1.tar.{SIZE}.00000000.partial").write_bytes(content(0)[:160_000])
    (copy,) = local_copies(files(server, 1))
    assert copy.read_bytes() == content(1)
    assert [each for each in server.ranges_of("1.tar") if each] == ["bytes=150000-"]
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_server_without_ranges_sends_whole_files(server: FileServer) -> None:
    server.ranges = False
    assert [copy.read_bytes() for copy in local_copies(files(server, 0, 1))] == [content(0), content(1)]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def cut(file: Path, place: int) -> None:
    os.truncate(file, place)


def shards_of_noise(server: FileServer) -> str:
    """Write two shards of pictures of several blocks each, whose bits no format checks; return their pattern."""
    for number in range(2):
        members = [
            (f"{i}.{extension}", body)
            for i in range(number, 9, 2)
            for extension, body in (("jpg", random.Random(i).randbytes(3 * BLOCK)), ("txt", f"caption {i}".encode()))
        ]
        write_tar(server.folder / f"set-{number}.tar", *members)
    return f"{server.url}/set-{{0..1}}.tar"


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("where", ["copy", "checksums"])
def test_a_damaged_copy_is_noticed_and_the_server_is_read_in_its_place(
    server: FileServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path, int], None],
    where: str,
) -> None:
    spec, rng, noticed = shards_of_noise(server), random.Random(1), 0
    wanted = contents(open_source(f"{server.folder}/set-{{0..1}}.tar"))
    for _ in range(10):
        opened = open_source(spec)
        copy = next((tmp_path / "cache").rglob("set-1.tar"))
        changed = copy if where == "copy" else checksums_of(copy)
        harm(changed, rng.randrange(changed.stat().st_size))
        capsys.readouterr()
        assert contents(opened) == wanted
        told = capsys.readouterr().err
        assert told == "" or f"{copy}: is not what was downloaded; it is deleted, and {server.url}/set-1.tar" in told
        assert copy.exists() == (told == "")  # the archive's end is not read
        noticed += not copy.exists()
    assert noticed > 5
    assert contents(open_source(spec)) == wanted
    assert copy.read_bytes() == (server.folder / "set-1.tar").read_bytes()


def test_every_flip_in_a_picture_is_noticed(server: FileServer, tmp_path: Path) -> None:
    source = WebDatasetSource("s", tar_shards(shards_of_noise(server))[1:])
    copy = next((tmp_path / "cache").rglob("set-1.tar"))
    whole, pictures = copy.read_bytes(), [source.image_bytes(row) for row in range(len(source))]
    for number in range(200):
        row = number % len(source)
        flip(copy, whole.index(pictures[row]) + random.Random(number).randrange(3 * BLOCK))
        assert source.image_bytes(row) == pictures[row]
        assert not copy.exists()
        copy.write_bytes(whole)
        keep_checksums(copy, copy)


def test_headers_of_a_damaged_copy_are_read_from_the_server(server: FileServer) -> None:
    """A header has a sum of its own, but not the long name that follows it."""
    name = "x" * 120
    write_tar(server.folder / "set-0.tar", (f"{name}.png", b"A"), (f"{name}.txt", b"a"))
    wanted = contents(open_source(f"{server.folder}/set-{{0..0}}.tar"))
    (copy,) = local_copies([RemoteFile(f"{server.url}/set-0.tar")])
    flip(copy, copy.read_bytes().index(name.encode()) + 60)
    assert contents(open_source(f"{server.url}/set-{{0..0}}.tar")) == wanted
    assert not copy.exists()


def test_a_copy_of_an_earlier_version_gets_checksums(server: FileServer) -> None:
    (copy,) = local_copies(files(server, 0))
    wanted = checksums_of(copy).read_bytes()
    assert len(wanted) == 4 * -(-SIZE // BLOCK)
    checksums_of(copy).unlink()
    local_copies(files(server, 0))
    assert checksums_of(copy).read_bytes() == wanted


def test_damaged_parquet_is_deleted_and_downloaded_again(server: FileServer, tmp_path: Path, call: Call) -> None:
    pictures = [random.Random(i).randbytes(2 * BLOCK) for i in range(6)]
    table = pa.table({"jpg": pictures, "caption": [f"caption {i}" for i in range(6)]})
    pq.write_table(table, server.folder / "set.parquet", compression="none")
    spec = f"{server.url}/set.parquet"
    wanted = contents(open_source(spec))
    assert wanted == contents(open_source(str(server.folder / "set.parquet")))
    (copy,) = (tmp_path / "cache").rglob("set.parquet")
    for place in (copy.read_bytes().index(pictures[3]) + 5, copy.stat().st_size - 20):
        flip(copy, place)
        damaged = (
            f"{copy}: was not what had been downloaded, and was deleted; run the same command to download it again"
        )
        with pytest.raises(UserError, match=re.escape(damaged)):
            contents(open_source(spec))
        assert contents(open_source(spec)) == wanted


def test_the_least_recently_used_copies_make_room(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_GB, str(3.5 * SIZE / 1e9))
    own = tmp_path / "cache" / "http" / "mine.tar"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"not downloaded")
    for number in (0, 1, 2):
        local_copies(files(server, number))
    before = (tmp_path / "cache" / "http").rglob("0.tar")
    changed = next(before).stat().st_mtime_ns
    (copy,) = local_copies(files(server, 0))  # used again
    assert copy.stat().st_mtime_ns == changed
    local_copies(files(server, 3))
    assert there(tmp_path) == ["0.tar", "2.tar", "3.tar", "mine.tar"]
    local_copies(files(server, 3, 4, 1))
    assert there(tmp_path) == ["1.tar", "3.tar", "4.tar", "mine.tar"]
    with pytest.raises(
        NoRoom, match=r"cache: has room for 0.0 GB of copies, and these 4 files take 0.0; .*DALLE_CACHE_GB"
    ):
        local_copies(files(server, 0, 1, 2, 3))
    assert there(tmp_path) == ["1.tar", "3.tar", "4.tar", "mine.tar"]
    monkeypatch.setenv(CACHE_GB, "much")
    with pytest.raises(UserError, match="DALLE_CACHE_GB: is 'much'; give the number of gigabytes"):
        local_copies(files(server, 0))


def test_a_tenth_of_the_disk_stays_free(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, disk = namedtuple("usage", "total used free"), 10 * SIZE
    # Eight files' size of the disk is taken by other things.
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: usage(disk, 0, disk - 6.5 * SIZE - sum(map(os.path.getsize, (tmp_path / "cache").rglob("*.tar")))),
    )
    for number in (0, 1, 2, 3):
        local_copies(files(server, number))
    assert there(tmp_path) == ["2.tar", "3.tar"]
    with pytest.raises(NoRoom):
        local_copies(files(server, 0, 1, 4))


def test_sources_are_read_from_copies_and_by_ranges_once_these_are_gone(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    for number in range(2):
        members = [
            (f"{i}.{extension}", f"{extension} {i}".encode())
            for i in range(number, 9, 2)
            for extension in ("png", "txt")
        ]
        write_tar(server.folder / f"set-{number}.tar", *members)
    spec = f"{server.url}/set-{{0..1}}.tar"
    local, found = open_source(f"{server.folder}/set-{{0..1}}.tar"), open_source(spec)
    done = len(server.requests)
    assert contents(found) == contents(local)
    assert found.identity == local.identity
    assert len(server.requests) == done
    for copy in (tmp_path / "cache").rglob("set-*.tar"):
        copy.unlink()
    assert contents(found) == contents(local)
    assert len(server.requests) > done
    monkeypatch.setenv(CACHE_GB, "0.000001")
    assert contents(open_source(spec)) == contents(local)
    assert "is read by ranges of bytes, since" in capsys.readouterr().err
    assert there(tmp_path) == []
