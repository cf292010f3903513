"""Indexes of tar shards: the quick walk of headers against tarfile, and index files that are kept, old or damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import Call
from helpers.file_server import FileServer
from helpers.sources import contents, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.data.formats import shard_index, tar_members, webdataset
from dalle_cli.data.formats.shard_index import INDEX, find_index, index_places, index_shard, save_index
from dalle_cli.data.formats.tar_members import LocalFile, Member
from dalle_cli.data.index import hash_members
from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError

# --- the walk of headers

names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
paths = st.one_of(names, st.tuples(names, st.integers(90, 270)).map(lambda each: (each[0] * each[1])[: each[1]]))
members = st.lists(st.tuples(paths, st.binary(max_size=1100), st.booleans(), st.booleans()), max_size=5)


@settings(max_examples=150)
@given(members, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_the_quick_walk_finds_what_tarfile_finds(
    tmp_path_factory: pytest.TempPathFactory, given_: list[tuple[str, bytes, bool, bool]], form: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "s.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, body, folder, exact in given_:
            header = tarfile.TarInfo(name)
            header.size = 0 if folder else len(body)
            header.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
            header.mtime = 1.5 if exact else 1  # pax writes a fraction as a record
            try:
                tar.addfile(header, None if folder else io.BytesIO(body))
            except ValueError:  # ustar has no room for the name
                continue
    quick, library = tar_members._plain_members(LocalFile(path)), list(tar_members._any_members(LocalFile(path)))
    assert quick is not None
    # Folders are passed over; of a long name that ends in several slashes tarfile leaves all but one.
    stripped = [[each._replace(name=each.name.rstrip("/")) for each in found] for found in (quick, library)]  # type: ignore[union-attr]
    assert stripped[0] == stripped[1]


def test_odd_archives_are_left_to_tarfile(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    path = write_tar(tmp_path / "s.tar", ("a.png", b"A"), link)
    assert tar_members._plain_members(LocalFile(path)) is None
    assert [member.fault for member in tar_members.members_of(LocalFile(path)) if isinstance(member, Member)] == [
        None,
        "a link",
    ]


# --- index files


@pytest.fixture(autouse=True)
def no_folder_of_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo, after each test, what dalle index sets for its own process."""
    monkeypatch.setenv(INDEX, "")


def shards(folder: Path, *numbers: int) -> Path:
    """Write shards of five samples, one of which has no picture and one an odd name, and return their folder."""
    for number in numbers:
        pairs = [(f"é{i}.txt", f"caption {number} {i}".encode()) for i in range(5)]
        pictures = [(f"é{i}.png", b"P" * (1000 * number + i)) for i in range(4)]
        write_tar(folder / f"s{number}.tar", *pairs, *pictures, (".hidden.png", b"H"))
    return folder


def test_a_source_is_the_same_with_and_without_index_files(tmp_path: Path, call: Call) -> None:
    folder = shards(tmp_path / "data", 1, 2, 3)
    plain = open_source(folder)
    expected = contents(plain)
    rows = [(key, len(data), len(caption), -1) for key, (data, caption) in expected.items()]
    assert plain.identity == hash_members(rows)
    done = call("index", folder)
    assert (done.code, done.out) == (0, f"{folder}\n")
    assert f"{folder}: 3 shards, 12 samples, 3 members left out" in done.err
    assert sorted(path.name for path in folder.glob("*.index")) == ["s1.tar.index", "s2.tar.index", "s3.tar.index"]
    with mock.patch.object(webdataset, "index_shard", side_effect=AssertionError("a header was read")):
        indexed = open_source(folder)
    assert contents(indexed) == contents(pickle.loads(pickle.dumps(indexed))) == expected
    assert (indexed.identity, indexed.skipped) == (plain.identity, plain.skipped)
    assert plain.skipped == [(f"s{number}/é4", "a caption without an image") for number in (1, 2, 3)]
    with mock.patch.object(webdataset, "hash_members", side_effect=AssertionError("all keys were read")):
        assert open_source(folder).identity == plain.identity
    assert len(pickle.dumps(indexed)) < 3000


def test_keys_of_nested_shards_are_sorted(tmp_path: Path, call: Call) -> None:
    write_tar(tmp_path / "a.tar", ("b/y.png", b"1"), ("c.png", b"2"), ("b/x.png", b"3"))
    write_tar(tmp_path / "a" / "b.tar", ("x.png", b"4"), ("z.png", b"5"))
    pattern = f"{tmp_path}/{{a,a/b}}.tar"
    plain = open_source(pattern)
    assert {key: data for key, (data, _) in contents(plain).items()} == {
        "a/b/x": b"3", "a/b/y": b"1", "a/b/z": b"5", "a/c": b"2",
    }  # fmt: skip
    assert plain.skipped == [("a/b/x", f"duplicate key, also in {tmp_path / 'a' / 'b.tar'}")]
    assert call("index", pattern).code == 0
    indexed = open_source(pattern)
    assert contents(indexed) == contents(plain)
    assert (indexed.identity, indexed.skipped) == (plain.identity, plain.skipped)


def test_an_index_of_an_older_shard_is_made_anew(tmp_path: Path, call: Call) -> None:
    folder = shards(tmp_path, 1, 2)
    call("index", folder)
    state = (tmp_path / "s2.tar").stat()
    write_tar(tmp_path / "s2.tar", ("new.png", b"N"))
    assert list(contents(open_source(folder))) == ["s1/é0", "s1/é1", "s1/é2", "s1/é3", "s2/new"]
    call("index", folder)
    found = find_index(LocalFile(tmp_path / "s2.tar"))
    assert found is not None
    assert len(found) == 1
    # The same size at another time is another shard too.
    os.utime(tmp_path / "s2.tar", ns=(state.st_mtime_ns, state.st_mtime_ns + 1))
    assert find_index(LocalFile(tmp_path / "s2.tar")) is None


@settings(max_examples=60)
@given(st.data())
def test_damage_of_an_index_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = shards(tmp_path_factory.mktemp("t"), 1)
    shard = LocalFile(folder / "s1.tar")
    file = index_places(shard)[0]
    save_index(index_shard(shard), file)
    expected = contents(open_source(folder))
    whole = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "empty"]))
    if kind == "flip":
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    changed = {"cut": whole[: data.draw(st.integers(0, len(whole) - 1))], "grow": whole + b"\0", "empty": b""}
    file.write_bytes(changed.get(kind, whole))
    assert contents(open_source(folder)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": 2**52},
        {"key_bytes": -1},
        {"left_out": [["a", 3]]},
        {"samples": "four"},
        {"digest": None},
        {"size": 1e400},
    ],
)
def test_hostile_headers_are_passed_over(tmp_path: Path, changes: dict[str, object]) -> None:
    shard = LocalFile(shards(tmp_path, 1) / "s1.tar")
    file = index_places(shard)[0]
    save_index(index_shard(shard), file)
    _, line, arrays = file.read_bytes().split(b"\n", 2)
    line = json.dumps({**json.loads(line), **changes}).encode()
    digest = hashlib.sha256(line).hexdigest()
    file.write_bytes(f"{shard_index._FORMAT} {digest}\n".encode() + line + b"\n" + arrays)
    assert find_index(shard) is None
    assert len(open_source(tmp_path)) == 4


def test_members_beyond_the_shard_are_not_believed(tmp_path: Path) -> None:
    """The arrays of a forged file have the right hash and point elsewhere."""
    shard = LocalFile(shards(tmp_path, 1) / "s1.tar")
    index = index_shard(shard)
    held = index.samples()
    for offset, size in ((10**9, 5), (-5, 5), (0, 10**9)):
        members = held.members.copy()
        members[0, shard_index.IMAGE] = offset, size
        forged = shard_index.Samples(held.keys, members)
        digest = hashlib.sha256(shard_index._arrays(forged)).hexdigest()
        header = replace(index.header, digest=digest)
        save_index(shard_index.ShardIndex(shard, header, forged, None), index_places(shard)[0])
        with pytest.raises(UserError, match=r"s1\.tar\.index: is damaged or of another version .*; delete it"):
            open_source(tmp_path).key(0)


def test_an_index_file_damaged_while_it_is_used_is_made_anew(tmp_path: Path, call: Call) -> None:
    folder = shards(tmp_path, 1)
    expected = contents(open_source(folder))
    call("index", folder)
    source = open_source(folder)
    file = folder / "s1.tar.index"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with mock.patch.object(shard_index, "_mapped", shard_index._mapped.__wrapped__):
        assert contents(source) == expected


def test_a_walk_through_all_keys_leaves_no_index_mapped(tmp_path: Path, call: Call) -> None:
    folder = shards(tmp_path, 1, 2, 3)
    call("index", folder)
    shard_index._mapped.cache_clear()
    source = open_source(folder)
    assert shard_index._mapped.cache_info().currsize == 0
    source.key(0)
    assert shard_index._mapped.cache_info().currsize == 1


def test_shares_and_a_folder_of_their_own(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = shards(tmp_path / "data", 1, 2, 3), tmp_path / "indexes"
    plain = open_source(folder)
    for number, names in ((1, ["s1"]), (2, ["s1", "s2"]), (3, ["s1", "s2", "s3"])):
        done = call("index", folder, "--index", elsewhere, "--shard", f"{number}/3")
        assert (done.code, done.out) == (0, f"{elsewhere}\n")
        assert f"{folder}: 1 shards, 4 samples, 1 members left out" in done.err
        assert sorted(path.name[:2] for path in elsewhere.glob("*.index")) == names
    assert not list(folder.glob("*.index"))
    monkeypatch.setenv(INDEX, str(elsewhere))
    with mock.patch.object(webdataset, "index_shard", side_effect=AssertionError("a header was read")):
        assert open_source(folder).identity == plain.identity


def test_large_shards_are_indexed_on_the_way_and_small_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = shards(tmp_path / "data", *range(40)), tmp_path / "indexes"
    monkeypatch.setenv(INDEX, str(kept))
    monkeypatch.setattr(webdataset, "available_cores", lambda: 2)
    plain = open_source(folder)
    assert not kept.exists()
    monkeypatch.setattr(webdataset, "KEPT_FROM", 1 << 20)
    assert open_source(folder).identity == plain.identity
    assert len(list(kept.glob("*.index"))) == 40
    monkeypatch.setattr(webdataset, "index_shard", mock.Mock(side_effect=AssertionError))
    indexed = open_source(folder)
    at = np.random.default_rng(0).permutation(len(plain))[:30].tolist()
    assert [(indexed.key(i), indexed.image_bytes(i)) for i in at] == [(plain.key(i), plain.image_bytes(i)) for i in at]


def test_shards_on_a_server_are_indexed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "data", 1, 2)
    monkeypatch.setenv(INDEX, str(tmp_path / "indexes"))
    server = FileServer(folder)
    pattern = f"{server.url}/s{{1..2}}.tar"
    first = open_source(pattern)
    assert first.identity == open_source(folder).identity
    with mock.patch.object(webdataset, "index_shard", side_effect=AssertionError("a header was read")):
        assert open_source(pattern).identity == first.identity
    server.stop()


def test_sources_without_shards_are_refused(tmp_path: Path, call: Call) -> None:
    (tmp_path / "a.png").write_bytes(b"A")
    assert "holds no .tar shards; sources of other formats need no index" in call("index", tmp_path).mistake()


def test_a_shard_that_cannot_be_read_now_is_no_damaged_shard(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index never keeps what a file system that fails for a moment seems to hold."""
    folder = shards(tmp_path, 1, 2)
    real = tar_members.LocalFile.open

    def fail(shard: LocalFile) -> io.RawIOBase:
        if shard.path.name == "s2.tar":
            raise OSError(errno.EIO, "Input/output error", str(shard.path))
        return real(shard)

    monkeypatch.setattr(tar_members, "_plain_members", lambda shard: None)
    monkeypatch.setattr(tar_members.LocalFile, "open", fail)
    assert f"{folder / 's2.tar'}: cannot be read: Input/output error" in call("scan", folder).mistake()
    assert "s2.tar" in call("index", folder).mistake()
    assert not (folder / "s2.tar.index").exists()
    monkeypatch.undo()
    assert len(open_source(folder)) == 8


def test_a_cache_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, blocked = shards(tmp_path / "data", 1, 2, 3), tmp_path / "a file"
    plain = open_source(folder)
    blocked.write_text("")
    monkeypatch.setenv(INDEX, str(blocked / "below"))
    monkeypatch.setattr(webdataset, "KEPT_FROM", 0)
    monkeypatch.setattr(webdataset, "_refused", False)
    capsys.readouterr()
    assert contents(open_source(folder)) == contents(plain)
    said = capsys.readouterr().err
    assert said.count("index: not kept (") == 1
    assert "set DALLE_INDEX to a folder that may be written" in said
    monkeypatch.delenv(INDEX)
    monkeypatch.setattr(shard_index, "user_cache", mock.Mock(side_effect=UserError("no home directory")))
    assert open_source(folder).identity == plain.identity


def test_index_files_come_to_the_place_that_was_asked_for(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = shards(tmp_path / "data", 1, 2), tmp_path / "indexes"
    monkeypatch.setattr(webdataset, "KEPT_FROM", 0)
    open_source(folder)  # keeps indexes in the cache
    assert call("index", folder).code == 0
    assert len(list(folder.glob("*.index"))) == 2
    assert call("index", folder, "--index", elsewhere).code == 0
    assert len(list(elsewhere.glob("*.index"))) == 2
    # A shard that is written anew is indexed anew, and kept, though it is small beside the others.
    write_tar(folder / "s1.tar", ("new.png", b"N"))
    open_source(folder)
    assert find_index(LocalFile(folder / "s1.tar")) is not None


@pytest.mark.parametrize("key", [b"../../up", b"/etc/x", b"a\\b", b"\xff\xfe"])
def test_keys_that_lead_out_of_a_folder_are_not_believed(tmp_path: Path, key: bytes) -> None:
    shard = LocalFile(write_tar(tmp_path / "s.tar", ("12345678"[: len(key)] + ".png", b"A")))
    index = index_shard(shard)
    _, offsets = index.samples().keys.buffers()
    forged = shard_index.Samples(
        shard_index.PackedStrings.of(np.frombuffer(key, np.uint8), offsets), index.samples().members
    )
    header = replace(index.header, digest=hashlib.sha256(shard_index._arrays(forged)).hexdigest())
    save_index(shard_index.ShardIndex(shard, header, forged, None), index_places(shard)[0])
    with pytest.raises(UserError, match=r"is damaged or of another version .*; delete it"):
        open_source(tmp_path).key(0)


def test_a_path_that_is_not_there_is_said(tmp_path: Path, call: Call) -> None:
    assert f"{tmp_path / 'nowhere'}: no such file or folder" in call("index", tmp_path / "nowhere").mistake()
