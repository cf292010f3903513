from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers.near_duplicates import ALTERATIONS, all_sides, cropped, drawing, half, jpeg, photo, thumbnails
from helpers.running import smallest_recipe, write_recipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dalle_cli.data.open_source import open_source
from dalle_cli.data.overlap.hash_index import MAX_DISTANCE
from dalle_cli.data.overlap.hashes import SIDE, hashes
from dalle_cli.data.overlap.pairs import Pairs, near_duplicates
from dalle_cli.data.overlap.pictures import UniquePictures, read_pictures
from dalle_cli.data.overlap.search import Comparison, Overlap, find_overlap, repeats
from dalle_cli.data.source import Source

MAX_PIXELS = 10**8


def pictures(images: list[Image.Image]) -> UniquePictures:
    places, small = np.arange(len(images)), thumbnails(images)
    return UniquePictures(small, places, places, hashes(small))


@pytest.mark.parametrize("name", ALTERATIONS)
@pytest.mark.parametrize("make", [photo, drawing])
def test_every_copy_is_found(name: str, make: Callable[[int], Image.Image]) -> None:
    # Of photographs nothing but copies is found; drawings of few flat shapes may look alike.
    rng = np.random.default_rng(7)
    originals = [make(seed) for seed in range(40)]
    others = [make(seed) for seed in range(1000, 1040)]
    copies = [ALTERATIONS[name](image, rng) for image in originals]
    for a, b in ((originals + others, copies), (copies, originals + others)):  # whichever side was cropped
        found = near_duplicates(pictures(a), pictures(b), workers=1)
        pairs = set(zip(found.a.tolist(), found.b.tolist(), strict=True))
        assert {(i, i) for i in range(40)} <= pairs
        if make is photo:
            assert len(pairs) == 40


def test_different_photographs_are_never_near_duplicates() -> None:
    found = near_duplicates(pictures([photo(seed, 96, 96) for seed in range(400)]), None, workers=1)
    assert len(found.a) == 0  # of 79,800 pairs


def test_a_mirrored_picture_or_half_of_one_is_not_a_near_duplicate() -> None:
    originals = [photo(seed) for seed in range(20)]
    others = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in originals]
    others += [cropped(image, 0.5, 0, 0, 0) for image in originals]
    assert len(near_duplicates(pictures(originals), pictures(others), workers=1).a) == 0


# --- sources


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a training folder, with copies of evaluation pictures, repeats and defects, and an evaluation folder."""
    root = tmp_path_factory.mktemp("folders")
    train, evaluation = root / "train", root / "eval"
    train.mkdir()
    evaluation.mkdir()

    def write(folder: Path, key: str, image: Image.Image) -> None:
        image.save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(f"picture {key}")

    for seed in range(30):
        write(train, f"a{seed:02d}", photo(seed))
    for seed in range(10):
        write(evaluation, f"e{seed}", photo(100 + seed))
    write(evaluation, "e3-again", photo(103))
    write(train, "c3", jpeg(photo(103)))
    write(train, "c4", half(photo(104)))
    write(train, "c4-again", half(photo(104)))
    write(evaluation, "e-of-a07", cropped(photo(7), 0.03, 0.02, 0.05, 0.04))
    write(train, "r05", jpeg(photo(5)))  # repeats of a05: re-encoded, of equal bytes, and re-encoded and cropped
    write(train, "s05", photo(5))
    write(train, "t05", all_sides(jpeg(photo(5)), np.random.default_rng(0)))
    for key in ("white1", "white2"):
        write(train, key, Image.new("RGB", (60, 60), "white"))
        write(evaluation, key, Image.new("RGB", (60, 60), "white"))
    (train / "z.png").write_bytes(b"nothing")
    return train, evaluation


def overlap(train: Source, other: Source | None, cache: Path, workers: int = 1) -> Overlap:
    return find_overlap(train, other, cache, Comparison(MAX_PIXELS, workers))


def lines(found: Overlap) -> dict[str, tuple[str, int, float]]:
    rows = [json.loads(line) for line in found.to_json_lines().splitlines()]
    return {row["key"]: (row["match"], row["distance"], row["similarity"]) for row in rows}


@pytest.mark.parametrize("workers", [1, 2])
def test_between_two_sources(folders: tuple[Path, Path], tmp_path: Path, workers: int) -> None:
    train, evaluation = map(open_source, folders)
    found = overlap(train, evaluation, tmp_path, workers)
    matches = lines(found)
    assert {key: match for key, (match, *_) in matches.items()} == {
        "a07": "e-of-a07", "c3": "e3", "c4": "e4", "c4-again": "e4"
    }  # fmt: skip
    assert all(distance <= MAX_DISTANCE and 0.9 < similar <= 1 for _, distance, similar in matches.values())
    assert (len(found.matches), found.others, found.incomparable) == (4, 4, 3)  # e3-again is another copy of c3
    assert "4 of 39 pictures are near-duplicates of 4 of 14 in" in found.summary()
    assert "3 not compared" in found.summary()
    turned = lines(overlap(evaluation, train, tmp_path, workers))
    assert {key: match for key, (match, *_) in turned.items()} == {
        "e-of-a07": "a07", "e3": "c3", "e3-again": "c3", "e4": "c4"
    }  # fmt: skip


def test_within_one_source_one_of_each_is_left(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = overlap(open_source(folders[0]), None, tmp_path)
    matches = lines(found)
    assert {key: match for key, (match, *_) in matches.items()} == {
        "r05": "a05", "s05": "a05", "t05": "a05", "c4-again": "c4"
    }  # fmt: skip
    assert matches["s05"][1:] == (0, 1.0)  # equal
    assert found.summary().split(": ", 1)[1].startswith("4 of 39 pictures repeat 2 earlier ones")


@given(st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] > pair[1])))
def test_excluding_repeats_leaves_no_pair_and_no_orphan(pairs: set[tuple[int, int]]) -> None:
    """No two remaining pictures are near-duplicates, and each excluded one has a remaining near-duplicate."""
    ordered = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    likeness = np.random.default_rng(0).uniform(0.8, 1, len(ordered)).astype(np.float32)
    rows = np.arange(12)
    found = repeats(
        UniquePictures(np.empty((12, SIDE, SIDE, 3), np.uint8), rows, rows, np.empty(12, np.uint64)),
        Pairs(ordered[:, 0], ordered[:, 1], np.zeros(len(ordered), np.int64), likeness),
    )
    out = {match.row for match in found}
    assert all(a in out or b in out for a, b in pairs)
    assert all(match.other not in out and (match.row, match.other) in pairs for match in found)


class _Unread:
    """A source whose pictures must not be read."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.format, self.skipped = source, source.name, source.format, source.skipped
        self.identity = source.identity

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def describe(self) -> str:
        return self.source.describe()

    def captions(self, i: int) -> list[str]:
        raise AssertionError

    def image_bytes(self, i: int) -> bytes:
        raise AssertionError


def test_thumbnails_are_kept_and_a_killed_run_is_resumed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(folders[0])
    whole = overlap(source, None, tmp_path).to_json_lines()
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    record = SIDE * SIDE * 3 + 4  # with its checksum
    assert len(kept) == len(source) * record
    assert overlap(_Unread(source), None, tmp_path).to_json_lines() == whole
    file.write_bytes(kept[: 10 * record + 17])  # killed while writing the eleventh
    with pytest.raises(AssertionError):
        overlap(_Unread(source), None, tmp_path)
    assert overlap(source, None, tmp_path).to_json_lines() == whole
    assert file.read_bytes() == kept
    overlap(open_source(folders[1]), None, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another source has another file


def test_equal_thumbnails_are_joined(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(folders[0])
    found = read_pictures(source, tmp_path, max_pixels=MAX_PIXELS, workers=1)
    places = {source.key(i): int(found.picture_of_row[i]) for i in range(len(source))}
    assert places["s05"] == places["a05"] >= 0
    assert places["r05"] != places["a05"]
    assert {key for key, place in places.items() if place < 0} == {"white1", "white2", "z"}
    assert len(found) == len(source) - 3 - 2
    assert (found.picture_of_row[found.rows] == np.arange(len(found))).all()


# --- the command


def test_the_command_and_then_the_exclusion(call: Call, folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, evaluation = folders
    out, sheet = tmp_path / "dup.jsonl", tmp_path / "dup.png"
    done = call("overlap", train, evaluation, "--out", out, "--sheet", sheet, "--workers", 1)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out)
    assert "4 of 39 pictures are near-duplicates" in done.err
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    printed = call("overlap", train, evaluation, "--workers", 1)
    assert printed.out == out.read_text()
    assert "--pretrained needs --clip" in call("overlap", train, "--pretrained", "openai").mistake()
    settings = smallest_recipe(tmp_path / "run", train)
    settings["data"]["exclude"] = str(out)
    recipe = write_recipe(tmp_path, settings)
    rest = call("overlap", train, evaluation, "--recipe", recipe, "--workers", 1)
    assert rest.out == ""
    assert "0 of 39 pictures" in rest.err
    assert call("train-tokenizer", recipe).code == 0
    assert call("tokenize-text", recipe).code == 0
    shown = json.loads(call("show", tmp_path / "run" / "tokens.zarr", "--json").out)
    assert shown["skipped"]["text"]["excluded: dup.jsonl"] == 4


def test_nothing_found_is_an_empty_file(call: Call, folders: tuple[Path, Path], tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    photo(5000).save(lone / "x.png")
    out = tmp_path / "dup.jsonl"
    done = call("overlap", lone, "--out", out, "--sheet", tmp_path / "x.png", "--workers", 1)
    assert done.code == 0
    assert out.read_text() == ""
    assert not (tmp_path / "x.png").exists()
    assert "there is no pair to show" in done.err
