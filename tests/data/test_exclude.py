from __future__ import annotations

from pathlib import Path

import pytest
from helpers.pictures import noise, write_sample

from dalle_cli.data.exclude import SourceWithExclusions, read_keys
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
    assert read_keys(lines)[0] == {"b", "d", "elsewhere"}


def test_a_wrong_file_of_keys_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "data", "a", noise(40, 40), "caption")
    source = open_source(tmp_path / "data")
    for name, text, message in (
        ("other.txt", "x\ny\n", "none of its 2 keys is in"),
        ("bad.jsonl", '{"key": "a"}\n["a"]\n', "bad.jsonl:2: is not an object"),
        ("half.jsonl", '{"key": "a"}\n{"ke', "half.jsonl:2: is not an object"),
        ("number.jsonl", '{"key": 3}\n', "number.jsonl:1: is not an object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            SourceWithExclusions(source, tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        SourceWithExclusions(source, tmp_path / "missing.txt")
    (tmp_path / "empty.jsonl").write_text("")  # no duplicates were found, so none are left out
    assert SourceWithExclusions(source, tmp_path / "empty.jsonl").count == 0


def test_keys_with_separators_other_than_line_feeds(tmp_path: Path) -> None:
    lines, plain = tmp_path / "dup.jsonl", tmp_path / "dup.txt"
    lines.write_text('{"key": "a\u2028b"}\r\n{"key": "c"}\n', encoding="utf-8-sig")
    plain.write_text("a\u2028b\r\nc\n", encoding="utf-8")
    assert read_keys(lines)[0] == read_keys(plain)[0] == {"a\u2028b", "c"}
