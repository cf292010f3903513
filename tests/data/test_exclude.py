from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import noise, write_sample
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.data import exclude
from dalle_cli.data.exclude import KeySet, SourceWithExclusions, read_keys
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import BadSample
from dalle_cli.errors import UserError


def test_excluded_samples_keep_their_places(tmp_path: Path) -> None:
    for key in "abcd":
        write_sample(tmp_path / "data", key, noise(40, 40), f"caption {key}")
    source = open_source(tmp_path / "data")
    lines, plain = tmp_path / "dup.jsonl", tmp_path / "dup.txt"
    lines.write_text('{"key": "b", "match": "a"}\n\n{"key": "d"}\n{"key": "elsewhere"}\n')
    plain.write_text("b\nd\n")
    for file in (lines, plain):
        fewer = SourceWithExclusions(source, file)
        assert [fewer.key(i) for i in range(len(fewer))] == list("abcd")
        assert fewer.count == 2
        assert fewer.captions(0) == ["caption a"]
        assert fewer.image_bytes(2) == source.image_bytes(2)
        for row in (1, 3):
            for read in (fewer.captions, fewer.image_bytes):
                with pytest.raises(BadSample, match=f"excluded: {file.name}"):
                    read(row)
        assert f"2 excluded by {file}" in fewer.describe()
    assert SourceWithExclusions(source, lines).name != SourceWithExclusions(source, plain).name
    assert list(read_keys(lines)) == ["b", "d", "elsewhere"]


def test_a_wrong_file_of_keys_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "data", "a", noise(40, 40), "caption")
    source = open_source(tmp_path / "data")
    for name, text, message in (
        ("other.txt", "x\ny\n", "none of its 2 keys is in"),
        ("bad.jsonl", '{"key": "a"}\n["a"]\n', "bad.jsonl:2: is not an object"),
        ("half.jsonl", '{"key": "a"}\r\n\r\n{"ke', "half.jsonl:3: is not an object"),
        ("old.jsonl", '{"key": "a"}\r{"key": "b"}\r\n\n{"key"}\n', "old.jsonl:4: is not an object"),
        ("number.jsonl", '{"key": 3}\n', "number.jsonl:1: is not an object"),
        ("deep.jsonl", "[" * 100_000 + "\n", "deep.jsonl:1: is not an object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            SourceWithExclusions(source, tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        SourceWithExclusions(source, tmp_path / "missing.txt")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is no ordinary file; write the keys into one"):
            SourceWithExclusions(source, place)
    (tmp_path / "empty.jsonl").write_text("")  # no duplicates were found, so none are left out
    assert SourceWithExclusions(source, tmp_path / "empty.jsonl").count == 0


def test_keys_with_separators_other_than_line_feeds(tmp_path: Path) -> None:
    lines, plain = tmp_path / "dup.jsonl", tmp_path / "dup.txt"
    lines.write_text('{"key": "a\u2028b"}\r\n{"key": "c"}\n', encoding="utf-8-sig")
    plain.write_text("a\u2028b\r\nc\n", encoding="utf-8")
    assert list(read_keys(lines)) == list(read_keys(plain)) == ["a\u2028b", "c"]


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=8),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=8, max_size=8),
)
def test_a_file_is_read_as_its_whole_text_would_be(
    lines: list[str], ends: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "keys.txt"
    text = "".join(line + end for line, end in zip(lines, ends, strict=False))
    file.write_bytes(text.encode("utf-8-sig"))
    whole = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert list(read_keys(file)) == [line for line in whole if line.strip()]


class Numbered:
    """A source of ``rows`` samples with the keys of even numbers, or of numbers after ``first``."""

    name = format = "numbered"

    def __init__(self, rows: int, first: int = 0, identity: str = "numbered") -> None:
        self.rows, self.first, self.identity = rows, first, identity
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.rows

    def key(self, i: int) -> str:
        return f"key-{2 * i + self.first}"

    def captions(self, i: int) -> list[str]:
        return [self.key(i)]

    def image_bytes(self, i: int) -> bytes:
        return self.key(i).encode()

    def describe(self) -> str:
        return self.name


def excluded(source: SourceWithExclusions) -> list[int]:
    """Return the rows that cannot be read."""
    found = []
    for row in range(len(source)):
        try:
            source.captions(row)
        except BadSample:
            found.append(row)
    return found


def naive(source: Numbered, file: Path) -> list[int]:
    keys = set(file.read_text().splitlines())
    return [row for row in range(len(source)) if source.key(row) in keys]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1000, 70_001])
def test_the_rows_are_those_of_a_set_of_strings(rows: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(rows)
    file, source = tmp_path / "out.txt", Numbered(rows)
    file.write_text("".join(f"key-{number}\n" for number in [0, *rng.integers(0, 3 * rows, rows).tolist()]))
    fewer = SourceWithExclusions(source, file)
    assert excluded(fewer) == naive(source, file)
    assert fewer.count == len(naive(source, file))
    assert excluded(pickle.loads(pickle.dumps(fewer))) == excluded(fewer)
    with pytest.raises(IndexError):
        fewer.captions(rows)


def test_a_set_of_keys_is_that_of_python() -> None:
    """Some of so many hashes begin or end with zeros, which NumPy's strings pad with."""
    keys = [f"{number}" for number in range(200_000)]
    inside = KeySet(keys[::2] + keys[:1000:2])
    assert len(inside) == 100_000
    np.testing.assert_array_equal(inside.contains(keys), np.arange(200_000) % 2 == 0)
    assert KeySet([]).contains(keys[:3]).tolist() == [False] * 3
    assert KeySet(["a"]).contains([]).tolist() == []


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let sources of 20 rows count as large; return the file of what is kept of the only one."""
    monkeypatch.setattr(exclude, "LARGE", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dalle" / "exclude"


def found(source: Numbered, file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], bool]:
    """Return the rows that ``file`` leaves out, and whether all keys were read to find them."""
    searched = []
    real = exclude._match
    monkeypatch.setattr(exclude, "_match", lambda *given: searched.append(given) or real(*given))
    rows = excluded(SourceWithExclusions(source, file))
    monkeypatch.setattr(exclude, "_match", real)
    assert rows == naive(source, file)
    return rows, bool(searched)


def test_the_rows_of_a_large_source_are_found_once(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.txt"
    file.write_text("key-4\nkey-5\nkey-38\n")
    assert found(Numbered(20), file, monkeypatch) == ([2, 19], True)
    assert found(Numbered(20), file, monkeypatch) == ([2, 19], False)
    assert found(Numbered(19), file, monkeypatch) == ([2], True)  # a small source
    assert len(list(large.iterdir())) == 1
    file.write_text("key-4\nkey-6\nkey-38\n")  # as long as before
    assert found(Numbered(20), file, monkeypatch) == ([2, 3, 19], True)
    assert found(Numbered(20, first=2), file, monkeypatch)[1]  # other keys in spite of the same identity
    assert found(Numbered(20, identity="other"), file, monkeypatch)[1]
    left_out = Numbered(20)
    left_out.skipped.append(("key-0", "is broken"))
    assert found(left_out, file, monkeypatch)[1]
    assert not found(Numbered(20), file, monkeypatch)[1]


def flipped(kept: Path) -> None:
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)


@pytest.mark.parametrize(
    "harm", [flipped, Path.unlink, lambda kept: kept.write_bytes(b""), lambda kept: kept.write_bytes(b"\n" * 99)]
)
def test_what_is_kept_is_checked(
    harm: Callable[[Path], object], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.txt"
    file.write_text("key-4\nkey-38\n")
    assert found(Numbered(20), file, monkeypatch) == ([2, 19], True)
    (kept,) = large.iterdir()
    harm(kept)
    assert found(Numbered(20), file, monkeypatch) == ([2, 19], True)
    assert found(Numbered(20), file, monkeypatch) == ([2, 19], False)


def test_a_wrong_file_is_refused_for_a_large_source_too(large: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    for _ in range(2):
        with pytest.raises(UserError, match=r"data\.exclude: .*out\.txt: cannot be read: .*No such file"):
            SourceWithExclusions(Numbered(20), file)
    file.write_text("key-1\n")
    for _ in range(2):
        with pytest.raises(UserError, match="none of its 1 keys is in numbered; give one made for it"):
            SourceWithExclusions(Numbered(20), file)
    file.write_bytes(b"key-2\n\xff\n")
    with pytest.raises(UserError, match=r"out\.txt: cannot be read: .*invalid start byte"):
        SourceWithExclusions(Numbered(20), file)
    assert not list(large.glob("*"))
    file.write_text("\n")
    assert SourceWithExclusions(Numbered(20), file).count == 0


def test_a_cache_that_may_not_be_written_is_done_without(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.txt"
    file.write_text("key-4\n")
    large.parent.mkdir(parents=True)
    large.write_text("a file in the way")
    for _ in range(2):
        assert found(Numbered(20), file, monkeypatch) == ([2], True)
