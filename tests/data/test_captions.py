"""Captions from every kind of file that they come in, and from a source."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dalle_cli.config.schema import Filters
from dalle_cli.data.captions import Caption, first_captions, read_captions, read_captions_by_id
from dalle_cli.errors import UserError


def test_lines_of_text(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(b"\xef\xbb\xbfa red star\r\n\n  a blue circle \n{not json}\n")
    assert read_captions(file) == [Caption("a red star"), Caption("a blue circle"), Caption("{not json}")]
    assert read_captions_by_id(file) == {"1": "a red star", "3": "a blue circle", "4": "{not json}"}


def test_json_lines_keep_their_ids(tmp_path: Path) -> None:
    rows = [
        {"prompt": " a red star ", "id": 7, "other": 1},
        {"caption": "a circle", "prompt": "a square", "image_id": "x", "caption_id": 3, "key": "k"},
        {"caption": "two stars", "id": [1], "prime": "top.png"},
        {"caption": "a separator \u2028 in a caption"},
    ]
    wanted = [
        Caption("a red star", {"id": 7}),
        Caption("a square", {"image_id": "x", "caption_id": 3, "key": "k"}),
        Caption("two stars", {}, Path("top.png")),
        Caption("a separator \u2028 in a caption"),
    ]
    for name in ("captions.jsonl", "captions.NDJSON"):
        file = tmp_path / name
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        assert read_captions(file) == wanted


def test_coco_captions_without_its_pictures(tmp_path: Path) -> None:
    file = tmp_path / "captions_val.json"
    annotations = [{"id": 5, "image_id": 9, "caption": "A cat.\n"}, {"id": 2, "image_id": 9, "caption": "Two cats"}]
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    assert read_captions(file) == [
        Caption("A cat.", {"id": 5, "image_id": 9}),
        Caption("Two cats", {"id": 2, "image_id": 9}),
    ]
    assert read_captions_by_id(file) == {"5": "A cat.", "2": "Two cats"}


def test_standard_input_is_text_or_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a star\n\na circle\n"))
    assert read_captions(Path("-")) == [Caption("a star"), Caption("a circle")]
    monkeypatch.setattr("sys.stdin", io.StringIO('\n{"prompt": "a star", "id": "s"}\n'))
    assert read_captions(Path("-")) == [Caption("a star", {"id": "s"})]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a star", "id": "s"}\n{"caption": "a circle"}'))
    assert read_captions_by_id(Path("-")) == {"s": "a star", "2": "a circle"}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b'{"prompt": "a star"}\n{"prompt": 3}\n', "a.jsonl, line 2: has no text under"),
        ("a.jsonl", b'["a star"]', "line 1: has no text under"),
        ("a.jsonl", b"\na star", "line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a", "prime": 3}', "line 1: its 'prime' is not the path"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "  "}', "a.jsonl, line 2: the caption is empty"),
        ("a.json", b"[", "not valid JSON"),
        ("a.json", b'{"prompt": "a star"}', "no list 'annotations'"),
        ("a.json", b'{"annotations": [{"caption": "a"}, {"id": 2}]}', "annotation 2: has no text under"),
        ("a.txt", b"\xff\xfe", "cannot be read as a file of captions"),
        ("a.txt", b"a star\na\0b", "a.txt, line 2: the caption is not text"),
    ],
)
def test_entries_that_are_no_captions(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=why):
        read_captions(file)


def test_captions_by_id(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text('{"id": "bird", "caption": "a bird"}\n\n{"id": 7, "caption": " a fish "}\n{"caption": "a cat"}\n')
    assert read_captions_by_id(file) == {"bird": "a bird", "7": "a fish", "4": "a cat"}
    file.write_text(f'{{"id": "00{"12" * 3000}", "caption": "a bird"}}\n{{"id": "000", "caption": "a fish"}}\n')
    assert read_captions_by_id(file) == {"12" * 3000: "a bird", "0": "a fish"}


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", '{"id": 1, "caption": "a"}\n{"id": "01", "caption": "b"}\n', "line 2: the id 1 is used twice"),
        ("a.jsonl", '{"id": 1}\n', "line 1: has no text under 'prompt' or 'caption'"),
        ("a.jsonl", '{"id": 1, "caption": "  "}\n', "line 1: the caption is empty"),
        ("a.jsonl", '{"id": [1], "caption": "a"}\n', "line 1: its id is not a number or a word"),
        ("a.jsonl", '{"id": true, "caption": "a"}\n', "line 1: its id is not a number or a word"),
        ("a.jsonl", "[1\n", "line 1: not JSON"),
        ("a.json", '{"annotations": [{"caption": "a"}]}', "annotation 1: its id is not a number or a word"),
        ("a.txt", "\n\n", "holds no caption"),
    ],
)
def test_captions_that_cannot_be_told_by_id(tmp_path: Path, name: str, content: str, why: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError, match=why) as refused:
        read_captions_by_id(file)
    assert str(file) in str(refused.value)


def test_the_first_different_captions_of_a_source_that_pass_the_filters(tmp_path: Path) -> None:
    captions = [["a star", "a red star"], [], ["a red star", "a tiny red star"], ["one two three"]]
    for number, lines in enumerate(captions):
        (tmp_path / f"{number}.png").write_bytes(b"never read here")
        (tmp_path / f"{number}.txt").write_text("\n".join(lines))
    spec = str(tmp_path)
    assert first_captions(spec, Filters(), 3) == ["a star", "a red star", "a tiny red star"]
    assert first_captions(spec, Filters(min_words=3), 9) == ["a red star", "a tiny red star", "one two three"]
