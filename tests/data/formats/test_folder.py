from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from helpers.sources import contents

from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import BadSample


def test_a_folder_of_images(tmp_path: Path) -> None:
    files = {
        "b.jpg": b"B",
        "b.txt": "naïve".encode(),
        "x/1.png": b"X",
        "x/1.txt": b"of x\n\nonce more\n",
        "y/1.PNG": b"Y",
        "y/1.txt": b"of y",
        "y/no.caption.gif": b"N",
        "y/latin.bmp": b"L",
        "y/latin.txt": b"caf\xe9",
        "alone.txt": b"alone",
        "other.csv": b"",
        ".hidden/z.png": b"Z",
        ".z.png": b"Z",
    }
    for name, body in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(body)
    source = open_source(tmp_path)
    assert contents(source) == {
        "b": (b"B", "naïve"),
        "x/1": (b"X", "of x|once more"),
        "y/1": (b"Y", "of y"),
        "y/latin": (b"L", "BAD the caption is not UTF-8 (byte 3)"),
        "y/no.caption": (b"N", "BAD no caption (no .txt file beside the image)"),
    }
    assert source.skipped == [("alone", "a caption without an image")]
    assert source.describe() == f"folder {tmp_path}: 5 samples, 1 left out, 1 without a caption"
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_folders_duplicates_and_broken_links(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "real.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing.png")
    source = open_source(tmp_path)
    assert [(source.key(i), source.image_bytes(i)) for i in range(len(source))] == [
        ("a", b"a.jpg"),
        ("link", b"real.png"),
        ("real", b"real.png"),
    ]
    assert source.skipped == [
        ("a", "a second image for this key: a.jpg is used, not a.png"),
        ("broken.png", "not a file, or a broken link"),
    ]
    (tmp_path / "real.png").unlink()
    with pytest.raises(BadSample, match="the image cannot be read"):
        source.image_bytes(2)
