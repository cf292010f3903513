from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.data.overlap.hash_index import MAX_DISTANCE, SURE_DISTANCE, HashIndex


@given(st.integers(0, 2**32), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=30)
def test_the_index_misses_nothing_up_to_four_bits(seed: int, n: int, probes: int) -> None:
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 2**64, n, dtype=np.uint64)
    asked = rng.integers(0, 2**64, probes, dtype=np.uint64)
    for i in range(min(n, probes)):  # half of the probes are near a stored hash
        if i % 2:
            bits = rng.choice(64, rng.integers(0, 7), replace=False).astype(np.uint64)
            asked[i] = stored[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    distance = np.bitwise_count(asked[:, None] ^ stored[None]) if n else np.empty((probes, 0))
    found = {}
    for near in HashIndex(stored).near(asked):
        for probe, row, bits in zip(near.probe.tolist(), near.row.tolist(), near.distance.tolist(), strict=True):
            found[probe, row] = bits
    assert all(distance[pair] == bits <= MAX_DISTANCE for pair, bits in found.items())
    assert {(int(i), int(j)) for i, j in np.argwhere(distance <= SURE_DISTANCE)} <= set(found)


def test_many_equal_hashes_are_compared_in_chunks() -> None:
    stored = np.zeros(1500, np.uint64)
    chunks = list(HashIndex(stored).near(np.zeros(1500, np.uint64)))
    assert max(len(chunk.probe) for chunk in chunks) <= 2**21
    assert len(chunks) == 70
    assert sum(len(chunk.probe) for chunk in chunks) == 35 * 1500**2
