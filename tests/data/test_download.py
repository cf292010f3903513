"""Copies of files on servers: downloads that break off go on, and the least recently used copies make room."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Call
from helpers.file_server import FileServer
from helpers.sources import contents, write_tar

from dalle_cli.data import remote, servers
from dalle_cli.data.download import CACHE, CACHE_GB, NoRoom, local_copies
from dalle_cli.data.open_source import open_source
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
