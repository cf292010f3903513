from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.pictures import write_sample
from helpers.sources import write_tar
from PIL import Image

from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import PAUSES, BadSample, Source, clean_caption, read_again, split_extension
from dalle_cli.errors import UserError


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a/b.c.JPG", ("a/b.c", "jpg")),
        ("a.d/b", ("a.d/b", "")),
        (".png", (".png", "")),
        ("a/.png", ("a/.png", "")),
        ("b.", ("b", "")),
    ],
)
def test_extensions(path: str, parts: tuple[str, str]) -> None:
    assert split_extension(path) == parts


def test_a_word_of_thousands_of_letters_is_no_caption() -> None:
    """BPE needs time quadratic in a word's length, so one damaged caption would hold up all others."""
    assert clean_caption("w" * 5000) == "w" * 5000
    assert clean_caption("word " * 5000) == ("word " * 5000).strip()
    with pytest.raises(BadSample, match=r"a word of more than 5000 letters \(1000000\)"):
        clean_caption("a " + "w" * 1_000_000)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("dalle_cli.data.source.time.sleep", slept.append)
    return slept


def failing(number: int | None, times: int) -> Callable[[], str]:
    left = [times]

    def read() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number), "/x") if number else OSError("corrupt snappy data")
        return "read"

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EMFILE, errno.ETIMEDOUT])
def test_faults_of_a_file_system_are_tried_again_and_then_stop(pauses: list[float], number: int) -> None:
    assert read_again("the image", failing(number, len(PAUSES))) == "read"
    assert pauses == list(PAUSES)
    with pytest.raises(UserError, match=r"^/x: cannot be read any more \(.*run the same command again$"):
        read_again("the image", failing(number, len(PAUSES) + 1))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, None])
def test_faults_of_a_file_make_a_bad_sample_at_once(pauses: list[float], number: int | None) -> None:
    with pytest.raises(BadSample, match="the image cannot be read: "):
        read_again("the image", failing(number, 1))
    with pytest.raises(BadSample):
        read_again("the image", failing(errno.ENOENT, 1), may_return=lambda: False)
    assert pauses == []


def tar_of(folder: Path, pictures: dict[str, bytes]) -> tuple[Source, Path]:
    shard = write_tar(folder / "s.tar", *((f"{name}.png", data) for name, data in pictures.items()))
    return open_source(shard), shard


def folder_of(folder: Path, pictures: dict[str, bytes]) -> tuple[Source, Path]:
    for name, data in pictures.items():
        (folder / f"{name}.png").write_bytes(data)
    return open_source(folder), folder


def manifest_of(folder: Path, pictures: dict[str, bytes]) -> tuple[Source, Path]:
    folder_of(folder / "p", pictures)
    manifest = folder / "m.csv"
    manifest.write_text("image,caption\n" + "".join(f"p/{name}.png,{name}\n" for name in pictures))
    return open_source(manifest), folder


@pytest.mark.parametrize("make", [tar_of, folder_of, manifest_of])
def test_a_source_that_is_away_for_a_moment_loses_nothing(
    tmp_path: Path, make: Callable[[Path, dict[str, bytes]], tuple[Source, Path]]
) -> None:
    write_sample(tmp_path / "one", "a", Image.new("RGB", (8, 8)))
    picture = (tmp_path / "one" / "a.png").read_bytes()
    inside = tmp_path / "here"
    (inside / "p").mkdir(parents=True)
    source, place = make(inside, dict.fromkeys("abcdefgh", picture))
    away = place.with_name("away")

    def take_away_for_a_moment() -> None:
        place.rename(away)
        time.sleep(0.7)
        away.rename(place)

    thread = threading.Thread(target=take_away_for_a_moment)
    thread.start()
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert [source.image_bytes(i) for i in range(len(source))] == [picture] * 8
    finally:
        thread.join()
