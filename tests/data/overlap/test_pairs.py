"""Candidates by bands, in parts and in shares, against a comparison of all pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dalle_cli.data.overlap import pairs as pairs_module
from dalle_cli.data.overlap.hash_index import INDEX_BYTES, MAX_DISTANCE
from dalle_cli.data.overlap.hashes import (
    SIDE,
    VIEWS,
    Thumbnails,
    hashes,
    similarity,
    similarity_of_view,
    view_hashes,
)
from dalle_cli.data.overlap.pairs import Pairs, join_pairs, near_duplicates
from dalle_cli.data.overlap.pictures import UniquePictures
from dalle_cli.stores.shards import Shard

GROUPS = [np.uint64(sum(1 << bit for bit in range(start, 64, 7))) for start in range(7)]


def noise_and_copies(seed: int, originals: int, copies: int) -> Thumbnails:
    """Return smooth noise, and copies of it under little to much finer noise."""
    rng = np.random.default_rng(seed)
    waves = np.cos(np.arange(8)[:, None] * np.linspace(0, np.pi, SIDE))
    fall = 1 / (1 + np.hypot(*np.meshgrid(np.arange(8), np.arange(8)))) ** 1.5
    strength = rng.normal(size=(originals, 3, 8, 8)) * fall
    smooth = 128 + 40 * np.einsum("nckl,ki,lj->nijc", strength, waves, waves, optimize=True)
    chosen = smooth[rng.integers(originals, size=copies)]
    noise = rng.normal(size=chosen.shape) * rng.uniform(0, 30, (copies, 1, 1, 1))
    return np.clip(rng.permutation(np.concatenate([smooth, chosen + noise])), 0, 255).astype(np.uint8)


def pictures(thumbnails: Thumbnails) -> UniquePictures:
    rows = np.arange(len(thumbnails))
    return UniquePictures(thumbnails, rows, rows, hashes(thumbnails))


Found = dict[tuple[int, int], list[tuple[int, float]]]
"""Distance and similarity of each pair, of one picture's views to the other and of the other's to the one."""


def compare_all(whole: Thumbnails, cropped: Thumbnails, same: bool) -> Found:
    """Return the near-duplicates among all pairs, from all views of ``whole``."""
    found: Found = {}
    others = hashes(cropped)
    for i, views in enumerate(view_hashes(whole)):
        different = views[:, None] ^ others
        distance = np.bitwise_count(different)
        equal_groups = sum(((different & group) == 0).astype(int) for group in GROUPS)
        distance[(distance > MAX_DISTANCE) | (equal_groups < 3)] = 255
        for j in np.flatnonzero(distance.min(axis=0) < 255).tolist():
            view = int(distance[:, j].argmin())
            pair = whole[i : i + 1], cropped[j : j + 1]
            if (i == j and same) or similarity_of_view(*pair, np.array([view]))[0] < 0.3:
                continue
            score = float(similarity(*pair)[0])
            if score >= 0.8:
                found[i, j] = [(int(distance[view, j]), score)]
    return found


def joined(one: Found, other: Found) -> Found:
    return {pair: one.get(pair, []) + other.get(pair, []) for pair in one | other}


def turned(found: Found) -> Found:
    return {(j, i): value for (i, j), value in found.items()}


def assert_equal(found: Pairs, wanted: Found) -> None:
    pairs = list(zip(found.a.tolist(), found.b.tolist(), strict=True))
    assert pairs == sorted(wanted)
    for pair, distance, score in zip(pairs, found.distance.tolist(), found.similarity.tolist(), strict=True):
        highest = max(each for _, each in wanted[pair])
        assert score == pytest.approx(highest, rel=1e-5)
        # The similarities of both directions may be equal up to rounding.
        assert distance in {bits for bits, each in wanted[pair] if each == pytest.approx(highest, rel=1e-5)}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave so little memory that each band is searched in 8 parts, and pictures in many blocks."""
    monkeypatch.setattr(pairs_module, "_INDEX_MEMORY", 250 * INDEX_BYTES)
    monkeypatch.setattr(pairs_module, "_PROBED_AT_ONCE", 300)
    monkeypatch.setattr(pairs_module, "_CHECKED_AT_ONCE", 100)


@pytest.mark.usefixtures("small_parts")
def test_within_some_thousand_pictures(tmp_path: Path) -> None:
    small = noise_and_copies(0, 1500, 500)
    there = compare_all(small, small, same=True)
    wanted = {(i, j): value for (i, j), value in joined(there, turned(there)).items() if i > j}
    assert len(wanted) > 150
    assert len({distance for each in wanted.values() for distance, _ in each}) > 5
    whole = near_duplicates(pictures(small), None, workers=1, folder=tmp_path)
    assert_equal(whole, wanted)
    assert list(tmp_path.iterdir()) == []
    shares = [near_duplicates(pictures(small), None, workers=1, shard=Shard(i, 3)) for i in (3, 1, 2)]
    assert all(len(share.a) for share in shares)
    assert_equal(join_pairs(shares, within=True), wanted)


@pytest.mark.usefixtures("small_parts")
def test_between_two_sets(tmp_path: Path) -> None:
    every = noise_and_copies(1, 900, 600)
    a, b = every[:1000], every[1000:]
    wanted = joined(compare_all(a, b, same=False), turned(compare_all(b, a, same=False)))
    assert len(wanted) > 100
    assert_equal(near_duplicates(pictures(a), pictures(b), workers=2), wanted)
    shares = [near_duplicates(pictures(a), pictures(b), workers=1, shard=Shard(i, 2)) for i in (1, 2)]
    assert_equal(join_pairs(shares, within=False), wanted)


def test_no_pictures() -> None:
    none, some = pictures(np.empty((0, SIDE, SIDE, 3), np.uint8)), pictures(noise_and_copies(2, 5, 2))
    for a, b in ((none, None), (none, some), (some, none)):
        assert len(near_duplicates(a, b, workers=1).a) == 0


def test_a_view_fits_the_byte_that_holds_it() -> None:
    assert VIEWS <= 256
