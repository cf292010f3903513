from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from helpers.sources import contents, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.data.formats.folder import FolderSource
from dalle_cli.data.formats.tar_members import LocalFile
from dalle_cli.data.formats.webdataset import WebDatasetSource
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import BadSample
from dalle_cli.errors import UserError


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, "/etc/hostname"
    return header


def test_one_shard(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        ("b.txt", "  ein schöner Hund\n".encode()),
        ("b.jpg", b"B"),
        ("./a/x.y.PNG", b"A"),
        ("a/x.y.json", json.dumps({"id": 1, "text": "from json", "name": "no"}).encode()),
        ("c.webp", b"C"),
        ("c.cls", b"7"),
        ("both.json", b'{"caption": "json"}'),
        ("both.txt", b"txt\r\n\n second line"),
        ("both.gif", b"D"),
        ("._b.jpg", b"junk of a Mac"),
        ("lone.txt", b"no image"),
    )
    source = open_source(path)
    assert contents(source) == {
        "a/x.y": (b"A", "from json"),
        "b": (b"B", "ein schöner Hund"),
        "both": (b"D", "txt|second line"),
        "c": (b"C", "BAD no caption (no .txt or .json member beside the image)"),
    }
    assert source.skipped == [("lone", "a caption without an image")]
    assert source.format == "webdataset"
    assert source.name == str(path)
    assert source.describe() == f"webdataset {path}: 4 samples, 1 left out"


def test_a_pickled_source_can_be_read(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "s.tar", ("a.png", b"A"), ("a.txt", b"one")))
    source.image_bytes(0)
    assert contents(pickle.loads(pickle.dumps(source))) == {"a": (b"A", "one")}


def test_names_in_two_folders_of_a_shard_stay_apart(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ("x/1.png", b"X"), ("x/1.txt", b"x"), ("y/1.png", b"Y"), ("y/1.txt", b"y"))
    assert contents(open_source(path)) == {"x/1": (b"X", "x"), "y/1": (b"Y", "y")}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_of_a_shard_keeps_its_whole_members(tmp_path: Path, format: int) -> None:
    path = tmp_path / "s.tar"
    bodies = {"a.png": b"a" * 700, "b.png": b"b" * 512, "c.png": b"c" * 1500}
    with tarfile.open(path, "w", format=format) as tar:
        for name, body in bodies.items():
            header = tarfile.TarInfo(name)
            header.size = len(body)
            tar.addfile(header, io.BytesIO(body))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {member.name[0]: member.offset_data + member.size for member in tar}
        starts = {member.name[0]: member.offset_data for member in tar}
    for cut in [*range(600, ends["c"] + 100, 97), *ends.values(), *(e - 1 for e in ends.values())]:
        path.write_bytes(whole[:cut])
        kept = {key for key, end in ends.items() if end <= cut}
        if not kept:
            with pytest.raises(UserError, match=r"no samples found.*cut short"):
                open_source(path)
            continue
        source = open_source(path)
        assert {source.key(i): source.image_bytes(i) for i in range(len(source))} == {
            key: bodies[f"{key}.png"] for key in kept
        }
        assert any(key == "s" and "cut short" in reason for key, reason in source.skipped)
        begun = {key for key, start in starts.items() if start <= cut < ends[key]}
        assert {key[0] for key, reason in source.skipped if reason.endswith("inside it")} == begun


def test_a_damaged_header_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ("a.png", b"A"), ("b.png", b"B"))
    data = bytearray(path.read_bytes())
    data[1024 + 5] ^= 255  # in the second header
    path.write_bytes(data)
    source = open_source(path)
    assert [source.key(i) for i in range(len(source))] == ["a"]
    assert source.skipped == [("s", "the archive is cut short or damaged at byte 1024; earlier samples are used")]


def test_unsafe_and_odd_members_are_left_out(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        ("ok.png", b"A"),
        ("../up.png", b"B"),
        ("a/../../up.png", b"B"),
        ("/etc/root.png", b"C"),
        ("..\\up.png", b"C"),
        link("soft.png", tarfile.SYMTYPE),
        link("hard.png", tarfile.LNKTYPE),
        link("pipe.png", tarfile.FIFOTYPE),
        link("folder.png", tarfile.DIRTYPE),
        ("bad\udcff.png", b"D"),
    )
    source = open_source(path)
    assert list(contents(source)) == ["ok"]
    outside = "its path leads out of the archive"
    assert source.skipped == [
        ("../up.png", outside),
        ("a/../../up.png", outside),
        ("/etc/root.png", outside),
        ("soft.png", "a link"),
        ("hard.png", "a link"),
        ("pipe.png", "not an ordinary file"),
        ("bad\\udcff.png", "the member's name is not UTF-8"),
    ]


def test_duplicate_keys_are_reported_and_never_mixed(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        ("a.jpg", b"1"),
        ("b.jpg", b"B"),
        ("b.png", b"second image"),
        ("b.txt", b"b"),
        ("a.jpg", b"2"),
        ("a.txt", b"of the second a"),
    )
    source = open_source(path)
    assert contents(source) == {
        "a": (b"1", "BAD no caption (no .txt or .json member beside the image)"),
        "b": (b"B", "b"),
    }
    assert source.skipped == [
        ("a", "duplicate key: its first sample is used, not the later a.jpg, a.txt"),
        ("b", "duplicate key: its first sample is used, not the later b.png"),
    ]


def test_images_first_and_captions_after_belong_together(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", ("a.png", b"A"), ("b.png", b"B"), ("a.txt", b"a"), ("b.txt", b"b"))
    assert contents(open_source(path)) == {"a": (b"A", "a"), "b": (b"B", "b")}


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        ("a.txt", b" \n", "empty"),
        ("a.txt", b"x" * (1 << 20) + b"x", "larger than 1 MiB"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b'{"caption": "\xe9"}', "not valid JSON"),
        ("a.json", b'["caption"]', "no text"),
        ("a.json", b'{"caption": 3, "name": null}', "no text"),
        ("a.json", b'{"caption": "\\ud800"}', "surrogate"),
        ("a.json", b'{"captions": [" ", 3]}', "empty"),
        ("a.json", b'{"captions": [3, {"caption": "x"}]}', "no text"),
        ("a.txt", "zwei".encode("utf-16"), r"not UTF-8 \(byte 0\)"),
        ("a.txt", "zwei".encode("utf-16-le"), "holds a NUL"),
    ],
)
def test_bad_captions(tmp_path: Path, name: str, body: bytes, reason: str) -> None:
    source = open_source(write_tar(tmp_path / "s.tar", ("a.png", b"A"), (name, body)))
    with pytest.raises(BadSample, match=reason):
        source.captions(0)
    assert source.image_bytes(0) == b"A"


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"captions": ["one", " two "], "caption": "no"}, ["one", "two"]),
        ({"captions": None, "caption": ["one", "", "two"]}, ["one", "two"]),
        ({"captions": [], "text": "one\ntwo", "name": "no"}, ["one\ntwo"]),
        ({"name": "smiling face"}, ["smiling face"]),
    ],
)
def test_captions_of_a_json(tmp_path: Path, fields: dict[str, object], captions: list[str]) -> None:
    source = open_source(write_tar(tmp_path / "s.tar", ("a.png", b"A"), ("a.json", json.dumps(fields).encode())))
    assert source.captions(0) == captions


def test_one_bad_line_among_good_ones_is_left_out(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "s.tar", ("a.png", b"A"), ("a.txt", b"one\ncaf\xe9\n\0\nfour")))
    assert source.captions(0) == ["one", "four"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_header_of_absurd_size_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 1 << 32
    with (tmp_path / "s.tar").open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            good = tarfile.TarInfo("a.png")
            good.size = 1
            tar.addfile(good, io.BytesIO(b"A"))
        file.seek(1024)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(1 << 33)  # sparse: no disk is used
    tracemalloc.start()
    source = open_source(tmp_path / "s.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents(source) == {"a": (b"A", "BAD no caption (no .txt or .json member beside the image)")}
    assert source.skipped == [
        ("s", "the archive is cut short or damaged (a header of absurd size); earlier samples are used")
    ]
    assert peak < 10_000_000


def test_an_image_of_absurd_size_is_refused_unread(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 32
    with (tmp_path / "s.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.truncate((1 << 32) + 4096)
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(1 << 32)
    for source in (WebDatasetSource("s", [LocalFile(tmp_path / "s.tar")]), FolderSource(tmp_path)):
        with pytest.raises(BadSample, match="the image is larger than 512 MiB"):
            source.image_bytes(0)


def test_a_byte_order_mark_is_not_part_of_the_caption(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "s.tar", ("a.png", b"A"), ("a.txt", b"\xef\xbb\xbfhello")))
    assert source.captions(0) == ["hello"]


def test_a_changed_shard_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.data.source.PAUSES", (0.01,))
    path = write_tar(tmp_path / "s.tar", ("a.png", b"A" * 5000))
    source = open_source(path)
    os.truncate(path, 3000)
    with pytest.raises(UserError, match="shorter than when it was indexed"):
        source.image_bytes(0)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        source.image_bytes(0)


def test_an_unreadable_shard_among_good_ones(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("0.png", b"A"))
    (tmp_path / "b.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "c.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    source = open_source(tmp_path)
    assert list(contents(source)) == ["a/0"]
    assert [key for key, _ in source.skipped] == ["b", "c"]
    assert all(reason.startswith("not a readable tar archive") for _, reason in source.skipped)


names = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0."), min_size=1, max_size=8)


@settings(max_examples=60)
@given(st.dictionaries(names, st.tuples(st.binary(max_size=600), st.text(max_size=30)), min_size=1, max_size=6))
def test_a_packed_tar_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, tuple[bytes, str]]
) -> None:
    members = []
    for key, (image, caption) in rows.items():
        members += [(f"d/{key}.txt", caption.encode("utf-8", "surrogatepass")), (f"d/{key}.jpg", image)]
    source = open_source(write_tar(tmp_path_factory.mktemp("t") / "s.tar", *members))
    assert source.skipped == []
    for i in range(len(source)):
        image, caption = rows[source.key(i).removeprefix("d/")]
        assert source.image_bytes(i) == image
        lines = caption.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        expected = [line.strip() for line in lines if line.strip() and "\0" not in line.strip()]
        if expected:
            assert source.captions(i) == expected
    assert len(source) == len(rows)


def test_names_of_two_extensions_are_one_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", ("x/s0.input.jpg", b"A"), ("x/s0.target.txt", b"an a"), ("s1.input.jpg", b"B"),
        ("s2.jpg", b"C"), ("s2.mask.png", b"M"), ("s2.txt", b"a c"), ("v.1.jpg", b"D"), ("v.2.jpg", b"E"),
    )  # fmt: skip
    source = open_source(path)
    nothing = "BAD no caption (no .txt or .json member beside the image)"
    assert contents(source) == {
        "s1.input": (b"B", nothing), "s2": (b"C", "a c"), "v.1": (b"D", nothing), "v.2": (b"E", nothing),
        "x/s0": (b"A", "an a"),
    }  # fmt: skip
    assert source.skipped == [("s2.mask.png", "a further picture of s2, without a caption")]


def test_an_empty_txt_does_not_hide_the_json(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", ("s.jpg", b"A"), ("s.txt", b" \n"), ("s.json", b'{"TEXT": "an a"}'))
    assert contents(open_source(path)) == {"s": (b"A", "an a")}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_shards_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"compressed.*unpack"):
            open_source(source)
