"""Captions from every kind of file that they come in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from dalle_cli.errors import UserError
from dalle_cli.sampling.prompts import Prompt, read_prompts


def test_lines_of_text(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red star\r\n\n  a blue circle \n{not json}\n")
    assert read_prompts(file) == [Prompt("a red star"), Prompt("a blue circle"), Prompt("{not json}")]


def test_json_lines_keep_their_ids(tmp_path: Path) -> None:
    rows = [
        {"prompt": " a red star ", "id": 7, "other": 1},
        {"caption": "a circle", "prompt": "a square", "image_id": "x", "caption_id": 3, "key": "k"},
        {"caption": "two stars", "id": [1], "prime": "top.png"},
        {"caption": "a separator \u2028 in a caption"},
    ]
    wanted = [
        Prompt("a red star", {"id": 7}),
        Prompt("a square", {"image_id": "x", "caption_id": 3, "key": "k"}),
        Prompt("two stars", {}, Path("top.png")),
        Prompt("a separator \u2028 in a caption"),
    ]
    for name in ("prompts.jsonl", "prompts.NDJSON"):
        file = tmp_path / name
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        assert read_prompts(file) == wanted


def test_coco_captions_without_its_pictures(tmp_path: Path) -> None:
    file = tmp_path / "captions_val.json"
    annotations = [{"id": 5, "image_id": 9, "caption": "A cat.\n"}, {"id": 2, "image_id": 9, "caption": "Two cats"}]
    file.write_text(json.dumps({"images": [], "annotations": annotations}))
    assert read_prompts(file) == [
        Prompt("A cat.", {"id": 5, "image_id": 9}),
        Prompt("Two cats", {"id": 2, "image_id": 9}),
    ]


def test_standard_input_is_text_or_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a star\n\na circle\n"))
    assert read_prompts(Path("-")) == [Prompt("a star"), Prompt("a circle")]
    monkeypatch.setattr("sys.stdin", io.StringIO('\n{"prompt": "a star", "id": "s"}\n'))
    assert read_prompts(Path("-")) == [Prompt("a star", {"id": "s"})]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", b'{"prompt": "a star"}\n{"prompt": 3}\n', "a.jsonl, line 2: has no text under"),
        ("a.jsonl", b'["a star"]', "line 1: has no text under"),
        ("a.jsonl", b"\na star", "line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a", "prime": 3}', "line 1: its 'prime' is no path"),
        ("a.json", b"[", "not valid JSON"),
        ("a.json", b'{"prompt": "a star"}', "no list 'annotations'"),
        ("a.json", b'{"annotations": [{"caption": "a"}, {"id": 2}]}', "annotation 2 has no caption"),
        ("a.txt", b"\xff\xfe", "cannot be read as a file of captions"),
    ],
)
def test_files_that_hold_no_captions(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=why):
        read_prompts(file)
