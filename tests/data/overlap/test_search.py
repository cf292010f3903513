from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers.running import smallest_recipe, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from dalle_cli.data.open_source import open_source
from dalle_cli.data.overlap.hash_index import MAX_DISTANCE, HashIndex
from dalle_cli.data.overlap.hashes import (
    BIT_THRESHOLD,
    COMPARISON_SIDE,
    CUTS,
    INTERVALS,
    SIDE,
    VIEWS,
    comparable,
    hashes,
    similarity,
    similarity_of_view,
    thumbnail,
    view_hashes,
)
from dalle_cli.data.overlap.search import (
    Overlap,
    UniquePictures,
    find_overlap,
    near_duplicates,
    read_pictures,
    repeats,
)
from dalle_cli.data.source import Source
from dalle_cli.shapes.world import random_scene, render

MAX_PIXELS = 10**8


@cache
def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """As many pictures as wanted with the spectrum of photographs (amplitude falls as 1 / frequency), and an edge."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width) * width, np.fft.fftfreq(height) * height))
    frequency[0, 0] = 1
    common = rng.standard_normal((height, width))
    channels = []
    for _ in range(3):
        white = common + 0.5 * rng.standard_normal((height, width))
        field = np.fft.ifft2(np.fft.fft2(white) / frequency**1.2).real
        channels.append(128 + 45 * (field - field.mean()) / field.std())
    pixels = np.stack(channels, axis=-1)
    left, top = rng.integers(0, width // 2), rng.integers(0, height // 2)
    pixels[top : top + height // 3, left : left + width // 3] += rng.normal(0, 40, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def drawing(seed: int) -> Image.Image:
    """A scene of the shapes world, large: flat colours, much symmetry."""
    return Image.fromarray(render(random_scene(0, "train", seed), 192))


def jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round((1 - right) * w), round((1 - bottom) * h)))


def one_side(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    cuts = [0.0] * 4
    cuts[rng.integers(4)] = rng.uniform(0.02, 0.05)
    return cropped(image, *cuts)


def all_sides(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return cropped(image, *rng.uniform(0.02, 0.05, 4))


COPIES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "jpeg 50": lambda image, _: jpeg(image),
    "half": lambda image, _: half(image),
    "one side": one_side,
    "all sides": all_sides,
    "all sides, half, jpeg 50": lambda image, rng: jpeg(half(all_sides(image, rng))),
}


def pictures(images: list[Image.Image]) -> UniquePictures:
    places = np.arange(len(images))
    return UniquePictures(np.stack([thumbnail(image) for image in images]), places, places)


# --- Hashes


def test_a_hash_is_the_signs_of_the_low_frequencies() -> None:
    """Against scipy's DCT."""
    thumbnails = pictures([photo(seed) for seed in range(20)]).thumbnails
    for picture, found in zip(thumbnails, hashes(thumbnails), strict=True):
        grey = picture @ np.array([0.299, 0.587, 0.114])
        whitened = dctn(grey, norm=None)[:8, :8] * np.hypot(*np.meshgrid(np.arange(8), np.arange(8)))
        bits = (whitened > BIT_THRESHOLD * np.sqrt(np.mean(whitened**2))).ravel()
        assert int(found) == int("".join("1" if bit else "0" for bit in bits), 2)


def test_a_view_has_the_hash_of_the_cropped_picture() -> None:
    """To a few bits: a thumbnail of the crop is not made of the same pixels."""
    images = [photo(seed, 320, 320) for seed in range(6)]
    distances = []
    views = view_hashes(pictures(images).thumbnails)
    assert views.shape == (6, VIEWS)
    assert (views[:, 0] == hashes(pictures(images).thumbnails)).all()
    for view in range(0, VIEWS, 7):
        (top, bottom), (left, right) = (INTERVALS[i] for i in divmod(view, len(INTERVALS)))
        crops = [cropped(image, left, top, right, bottom) for image in images]
        distances += np.bitwise_count(hashes(pictures(crops).thumbnails) ^ views[:, view]).tolist()
    assert max(distances) <= 4
    assert np.mean(distances) < 1.5


def test_symmetric_drawings_hash_the_same_under_noise() -> None:
    """Half of a symmetric picture's frequencies are 0, and their bits must not follow the noise."""
    plain = Image.new("RGB", (200, 200), "white")
    plain.paste((200, 30, 30), (60, 60, 140, 140))
    rng = np.random.default_rng(0)
    noisy = [np.asarray(plain) + rng.normal(0, 6, (200, 200, 3)) for _ in range(20)]
    found = hashes(pictures([plain, *(Image.fromarray(n.clip(0, 255).astype(np.uint8)) for n in noisy)]).thumbnails)
    assert np.bitwise_count(found ^ found[0]).max() <= 1


def naive_similarity(whole: NDArray[np.uint8], cut: NDArray[np.uint8], view: int) -> float:
    """Area averages pixel by pixel, gradients, cosine."""

    def shrunk(picture: NDArray[np.uint8], vertical: tuple[float, float], horizontal: tuple[float, float]) -> NDArray:
        out = np.zeros((COMPARISON_SIDE, COMPARISON_SIDE, 3))
        weights = []
        for start, end in (vertical, horizontal):
            edges = (start + (1 - start - end) * np.arange(COMPARISON_SIDE + 1) / COMPARISON_SIDE) * SIDE
            weights.append(
                [
                    [max(0.0, min(edges[i + 1], p + 1) - max(edges[i], p)) for p in range(SIDE)]
                    for i in range(COMPARISON_SIDE)
                ]
            )
        for y, row in enumerate(weights[0]):
            for x, column in enumerate(weights[1]):
                area = np.outer(row, column)
                out[y, x] = (picture * area[..., None]).sum((0, 1)) / area.sum()
        return out

    def gradients(picture: NDArray) -> NDArray:
        return np.concatenate([np.diff(picture, axis=0).ravel(), np.diff(picture, axis=1).ravel()])

    vertical, horizontal = (INTERVALS[i] for i in divmod(view, len(INTERVALS)))
    a, b = gradients(shrunk(whole, vertical, horizontal)), gradients(shrunk(cut, (0, 0), (0, 0)))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_similarity_is_the_best_views_cosine_of_gradients() -> None:
    a = pictures([photo(1), photo(2), drawing(3)]).thumbnails
    b = pictures([cropped(photo(1), 0.05, 0, 0, 0.025), photo(4), jpeg(drawing(3))]).thumbnails
    for view in (0, 5, 38, 80):
        expected = [naive_similarity(one, two, view) for one, two in zip(a, b, strict=True)]
        np.testing.assert_allclose(similarity_of_view(a, b, np.full(3, view)), expected, atol=1e-4)
    best = np.max([similarity_of_view(a, b, np.full(3, view)) for view in range(VIEWS)], axis=0)
    np.testing.assert_allclose(similarity(a, b), best, atol=1e-5)
    assert similarity(a, b)[0] > 0.95
    assert similarity(a, b)[1] < 0.5
    assert similarity(a, b)[2] > 0.9
    np.testing.assert_allclose(similarity(a, a), 1, atol=1e-5)


def test_one_colour_is_not_comparable() -> None:
    grain = np.random.default_rng(0).normal(30, 20, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    found = comparable(pictures([Image.new("RGB", (50, 50), "red"), Image.fromarray(grain), photo(0)]).thumbnails)
    assert found.tolist() == [False, False, True]


# --- Search


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_the_index_misses_nothing_up_to_seven_bits(seed: int, n: int, probes: int) -> None:
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 2**64, n, dtype=np.uint64)
    asked = rng.integers(0, 2**64, probes, dtype=np.uint64)
    for i in range(min(n, probes)):  # half of them near to a stored one
        if i % 2:
            bits = rng.choice(64, rng.integers(0, 13), replace=False).astype(np.uint64)
            asked[i] = stored[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    distance = np.bitwise_count(asked[:, None] ^ stored[None]) if n else np.empty((probes, 0))
    found = {}
    for near in HashIndex(stored).near(asked):
        for probe, row, bits in zip(near.probe.tolist(), near.row.tolist(), near.distance.tolist(), strict=True):
            found[probe, row] = bits
    assert all(distance[pair] == bits <= MAX_DISTANCE for pair, bits in found.items())
    assert {(int(i), int(j)) for i, j in np.argwhere(distance <= 7)} <= set(found)


def test_many_equal_hashes_are_looked_at_in_pieces() -> None:
    stored = np.zeros(1500, np.uint64)
    pieces = [near for near in HashIndex(stored).near(np.zeros(1500, np.uint64))]
    assert max(len(piece.probe) for piece in pieces) <= 2**21
    assert len(pieces) == 8
    assert sum(len(piece.probe) for piece in pieces) == 4 * 1500**2


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("make", [photo, drawing])
def test_every_copy_is_found(name: str, make: Callable[[int], Image.Image]) -> None:
    """And for photographs nothing but copies; drawings of few flat shapes may look alike."""
    rng = np.random.default_rng(7)
    originals = [make(seed) for seed in range(40)]
    others = [make(seed) for seed in range(1000, 1040)]
    copies = [COPIES[name](image, rng) for image in originals]
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


# --- Sources


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training folder with three copies of evaluation pictures, repeats of its own and trouble; an evaluation one."""
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
    write(train, "r05", jpeg(photo(5)))  # repeats of a05: one re-encoded, one of the same bytes, one of that cropped
    write(train, "s05", photo(5))
    write(train, "t05", all_sides(jpeg(photo(5)), np.random.default_rng(0)))
    for key in ("white1", "white2"):
        write(train, key, Image.new("RGB", (60, 60), "white"))
        write(evaluation, key, Image.new("RGB", (60, 60), "white"))
    (train / "z.png").write_bytes(b"nothing")
    return train, evaluation


def overlap(train: Source, other: Source | None, cache: Path, workers: int = 1) -> Overlap:
    return find_overlap(train, other, cache, max_pixels=MAX_PIXELS, workers=workers)


def lines(found: Overlap) -> dict[str, tuple[str, int, float]]:
    told = [json.loads(line) for line in found.to_json_lines().splitlines()]
    return {line["key"]: (line["match"], line["distance"], line["similarity"]) for line in told}


@pytest.mark.parametrize("workers", [1, 2])
def test_between_two_sources(folders: tuple[Path, Path], tmp_path: Path, workers: int) -> None:
    train, evaluation = map(open_source, folders)
    found = overlap(train, evaluation, tmp_path, workers)
    told = lines(found)
    assert {key: match for key, (match, *_) in told.items()} == {
        "a07": "e-of-a07", "c3": "e3", "c4": "e4", "c4-again": "e4"
    }  # fmt: skip
    assert all(distance <= MAX_DISTANCE and 0.9 < similar <= 1 for _, distance, similar in told.values())
    assert (len(found.matches), found.others, found.incomparable) == (4, 4, 3)  # e3-again is another copy of c3
    assert "4 of 39 pictures are near-duplicates of 4 of 14 in" in found.summary()
    assert "3 not compared" in found.summary()
    turned = lines(overlap(evaluation, train, tmp_path, workers))
    assert {key: match for key, (match, *_) in turned.items()} == {
        "e-of-a07": "a07", "e3": "c3", "e3-again": "c3", "e4": "c4"
    }  # fmt: skip


def test_within_one_source_one_of_each_is_left(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = overlap(open_source(folders[0]), None, tmp_path)
    told = lines(found)
    assert {key: match for key, (match, *_) in told.items()} == {
        "r05": "a05", "s05": "a05", "t05": "a05", "c4-again": "c4"
    }  # fmt: skip
    assert told["s05"][1:] == (0, 1.0)  # equal
    assert found.summary().split(": ", 1)[1].startswith("4 of 39 pictures repeat 2 earlier ones")


@given(st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] > pair[1])))
def test_what_is_left_out_leaves_no_pair_and_no_orphan(pairs: set[tuple[int, int]]) -> None:
    """Whatever the near-duplicates: those left have none among them, each left out has one that is left."""
    from dalle_cli.data.overlap.search import Pairs

    ordered = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)
    likeness = np.random.default_rng(0).uniform(0.8, 1, len(ordered)).astype(np.float32)
    rows = np.arange(12)
    found = repeats(
        UniquePictures(np.empty((12, SIDE, SIDE, 3), np.uint8), rows, rows),
        Pairs(ordered[:, 0], ordered[:, 1], np.zeros(len(ordered), np.int64), likeness),
    )
    out = {match.row for match in found}
    assert all(a in out or b in out for a, b in pairs)
    assert all(match.other not in out and (match.row, match.other) in pairs for match in found)


class _Unread:
    """A source whose pictures must not be read again."""

    def __init__(self, source: Source) -> None:
        self.source, self.name, self.format, self.skipped = source, source.name, source.format, source.skipped

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


def test_thumbnails_are_kept_and_a_killed_run_goes_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(folders[0])
    whole = overlap(source, None, tmp_path).to_json_lines()
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    assert len(kept) == len(source) * SIDE * SIDE * 3
    assert overlap(_Unread(source), None, tmp_path).to_json_lines() == whole
    file.write_bytes(kept[: 10 * SIDE * SIDE * 3 + 17])  # killed in the middle of the eleventh
    with pytest.raises(AssertionError):
        overlap(_Unread(source), None, tmp_path)
    assert overlap(source, None, tmp_path).to_json_lines() == whole
    assert file.read_bytes() == kept
    overlap(open_source(folders[1]), None, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another source is another file


def test_equal_thumbnails_are_joined(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(folders[0])
    found = read_pictures(source, tmp_path, max_pixels=MAX_PIXELS, workers=1)
    places = {source.key(i): int(found.picture_of_row[i]) for i in range(len(source))}
    assert places["s05"] == places["a05"] >= 0
    assert places["r05"] != places["a05"]
    assert {key for key, place in places.items() if place < 0} == {"white1", "white2", "z"}
    assert len(found) == len(source) - 3 - 2
    assert (found.picture_of_row[found.rows] == np.arange(len(found))).all()


# --- The command


def test_the_command_and_then_the_exclusion(call: Call, folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, evaluation = folders
    out, sheet = tmp_path / "dup.jsonl", tmp_path / "dup.png"
    done = call("overlap", train, evaluation, "--out", out, "--sheet", sheet, "--workers", 1)
    assert done.code == 0 and done.out.strip() == str(out), done.err
    assert "4 of 39 pictures are near-duplicates" in done.err
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    printed = call("overlap", train, evaluation, "--workers", 1)
    assert printed.out == out.read_text()
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


def test_cuts_are_what_the_text_says() -> None:
    assert CUTS == (0.0, 0.025, 0.05)
    assert len(INTERVALS) == 9
    assert VIEWS == 81
