from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from helpers.sources import contents, write_files
from PIL import Image

from dalle_cli.data.images import decode_image
from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError


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
        "y/no.caption": (b"N", "BAD no caption (no .txt, .caption, .json beside the image)"),
    }
    assert source.skipped == [("alone", "a caption without an image")]
    assert source.describe() == f"folder {tmp_path}: 5 samples, 1 left out, 1 without a caption"
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_a_folders_duplicates_and_broken_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.data.source.PAUSES", (0.01,))
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
    with pytest.raises(UserError, match=r"real\.png: cannot be read any more \(No such file"):
        source.image_bytes(2)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a.jpg": "A", "a.caption": "an a"}, {"a": "an a"}),
        ({"a.jpg": "A", "a.jpg.txt": "an a"}, {"a": "an a"}),
        ({"a.jpg": "A", "a.json": '{"Prompt": ["an a", "the a"]}'}, {"a": "an a|the a"}),
        ({"a.jpg": "A", "a.txt": "", "a.json": '{"caption": "an a"}'}, {"a": "an a"}),
        ({"a.jpg": "A", "a.caption": "second", "a.txt": "first"}, {"a": "first"}),
        ({"images/a.jpg": "A", "texts/a.txt": "an a"}, {"images/a": "an a"}),
        ({"gr\u00f6\u00dfe.jpg": "A", "gro\u0308\u00dfe.txt": "an a"}, {"gr\u00f6\u00dfe": "an a"}),
        ({"a.jpg": "A", "captions.csv": "image,caption\na.jpg,an a\n"}, {"a": "an a"}),
        ({"train/a.jpg": "A", "train/metadata.csv": "file_name,text\na.jpg,an a\n", "test/b.jpg": "B",
          "test/metadata.csv": "file_name,text\nb.jpg,a b\n"}, {"a": "an a"}),
        ({"a.jpg": "A", "m.ndjson": '{"image": "a.jpg", "prompt": "an a"}\n'}, {"a": "an a"}),
    ],
)  # fmt: skip
def test_captions_in_the_forms_in_which_they_come(
    tmp_path: Path, files: dict[str, bytes | str], found: dict[str, str]
) -> None:
    write_files(tmp_path, files)
    source = open_source(tmp_path)
    assert contents(source) == {key: (b"A", caption) for key, caption in found.items()}
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_names_that_may_belong_to_several_images_are_told(tmp_path: Path) -> None:
    write_files(tmp_path, {"x/a.jpg": "A", "y/a.jpg": "A", "texts/a.txt": "an a", "package.json": "{}"})
    source = open_source(tmp_path)
    assert source.skipped == [("texts/a", "may belong to 2 images of this name")]
    assert contents(source)["x/a"][1].startswith("BAD no caption")


def test_masks_and_formats_that_are_not_read_are_told(tmp_path: Path) -> None:
    write_files(
        tmp_path, {"a.jpg": "A", "a.txt": "an a", "a.mask.png": "M", "b.heic": "H", "c.v1.jpg": "C", "c.txt": "no"}
    )
    source = open_source(tmp_path)
    assert list(contents(source)) == ["a", "c.v1"]
    assert source.skipped == [
        ("a.mask.png", "a further picture of a, without a caption"),
        ("b.heic", "a .heic is not read; convert it to JPEG or PNG"),
        ("c", "a caption without an image"),
    ]


@pytest.mark.parametrize("extension", ["jpe", "jfif", "JPEG", "tif", "TIFF", "avif"])
def test_every_usual_spelling_of_a_format_is_found_and_decoded(tmp_path: Path, extension: str) -> None:
    formats = {"t": "TIFF", "a": "AVIF"}
    Image.new("RGB", (9, 7), (200, 30, 30)).save(tmp_path / f"a.{extension}", formats.get(extension[0].lower(), "JPEG"))
    source = open_source(tmp_path)
    assert decode_image(source.image_bytes(0)).size == (9, 7)
