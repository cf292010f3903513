from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dalle_cli.data.overlap.hash_index import (
    INDEX_BYTES,
    LARGEST_RUN,
    MAX_DISTANCE,
    SURE_DISTANCE,
    BandIndex,
    BandPart,
    band_parts,
)

GROUPS = [np.uint64(sum(1 << bit for bit in range(start, 64, 7))) for start in range(7)]


def parts_of(bits: int) -> list[BandPart]:
    return [BandPart(band, part, bits) for band in range(35) for part in range(1 << bits)]


def hashes_and_probes(seed: int, n: int, probes: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return random hashes, and probes of which half are near one of them."""
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 2**64, n, dtype=np.uint64)
    asked = rng.integers(0, 2**64, probes, dtype=np.uint64)
    for i in range(1, min(n, probes), 2):
        bits = rng.choice(64, rng.integers(0, 13), replace=False).astype(np.uint64)
        asked[i] = stored[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    return stored, asked


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 60), st.integers(0, 3))
@settings(max_examples=30)
def test_all_parts_find_exactly_the_near_hashes_with_three_equal_groups(
    seed: int, n: int, probes: int, bits: int
) -> None:
    stored, asked = hashes_and_probes(seed, n, probes)
    different = asked[:, None] ^ stored[None]
    distance = np.bitwise_count(different)
    equal_groups = sum(((different & group) == 0).astype(int) for group in GROUPS)
    found = {}
    for part in parts_of(bits):
        for near in BandIndex(stored, part).near(asked):
            for probe, row, count in zip(near.probe.tolist(), near.row.tolist(), near.distance.tolist(), strict=True):
                found[probe, row] = count
    wanted = np.argwhere((equal_groups >= 3) & (distance <= MAX_DISTANCE)).tolist()
    assert found == {(i, j): int(distance[i, j]) for i, j in wanted}
    assert {(int(i), int(j)) for i, j in np.argwhere(distance <= SURE_DISTANCE)} <= set(found)


def test_parts_share_the_hashes_out_and_keep_to_the_memory() -> None:
    assert band_parts(1000, 1000 * INDEX_BYTES) == parts_of(0)
    assert band_parts(1000, 999 * INDEX_BYTES) == parts_of(1)
    assert band_parts(1000, 100 * INDEX_BYTES) == parts_of(4)
    assert band_parts(0, 0, at_least=100) == parts_of(2)
    stored, _ = hashes_and_probes(0, 5000, 0)
    sizes = [sum(len(near.row) for near in BandIndex(stored, part).near(stored)) for part in parts_of(2)]
    assert np.sum(np.reshape(sizes, (35, 4)), axis=1).tolist() == [5000] * 35
    assert max(sizes) < 1500


def test_an_index_takes_no_more_memory_than_reckoned() -> None:
    stored = np.random.default_rng(0).integers(0, 2**64, 2**18 - 1, dtype=np.uint64)
    tracemalloc.start()
    index = BandIndex(stored, BandPart(0))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept <= 19 * len(stored)
    assert peak <= INDEX_BYTES * len(stored)
    assert index.part == BandPart(0)


def test_many_equal_hashes_are_compared_in_chunks() -> None:
    stored = np.zeros(1500, np.uint64)
    chunks = [chunk for part in parts_of(1) for chunk in BandIndex(stored, part).near(np.zeros(1500, np.uint64))]
    assert max(len(chunk.probe) for chunk in chunks) <= 2**21
    assert len(chunks) == 70
    assert sum(len(chunk.probe) for chunk in chunks) == 35 * 1500**2


def test_of_too_many_equal_hashes_the_first_are_compared() -> None:
    stored = np.random.default_rng(0).permutation(np.repeat(np.arange(2, dtype=np.uint64), 3 * LARGEST_RUN))
    for near in BandIndex(stored, BandPart(0)).near(np.array([1], np.uint64)):
        assert near.row.tolist() == np.flatnonzero(stored == 1)[:LARGEST_RUN].tolist()
