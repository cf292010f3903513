"""Search for near hashes without comparing all pairs, by multi-index hashing (Norouzi et al. 2012).

A hash is split into four parts of 16 bits. If two hashes differ in at most 7 bits, then at least one of their parts
differs in at most one bit. So only hashes with such a part in common are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 10
"""Maximum number of bits in which near hashes differ."""
PARTS = 4
PART_BITS = 16
_FLIPS = np.array([0, *(1 << bit for bit in range(PART_BITS))], dtype=np.int64)
_CANDIDATES_AT_ONCE = 1 << 21
"""Number of candidates compared at once, which bounds memory when many hashes share a part."""


class NearPairs(NamedTuple):
    """Pairs of a probe and a row of the index, with the number of bits that differ, each (n,); pairs may repeat."""

    probe: NDArray[np.int64]
    row: NDArray[np.int64]
    distance: NDArray[np.uint8]


class HashIndex:
    """An index of ``hashes`` (n,) uint64, sorted by each of their parts."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self.hashes = hashes
        self._order, self._first = [], []
        for part in range(PARTS):
            values = _part(hashes, part)
            self._order.append(np.argsort(values, kind="stable").astype(np.int32))
            counts = np.bincount(values, minlength=1 << PART_BITS)
            self._first.append(np.concatenate([[0], np.cumsum(counts)]))

    def near(self, probes: NDArray[np.uint64]) -> Iterator[NearPairs]:
        """Yield, in chunks, the rows within MAX_DISTANCE of each probe; none up to 7 bits away is missed."""
        for part in range(PARTS):
            order, first = self._order[part], self._first[part]
            values = _part(probes, part)
            for flip in _FLIPS:
                start = first[values ^ flip]
                counts = first[(values ^ flip) + 1] - start
                total = np.cumsum(counts)
                at = 0
                while at < len(probes):
                    before = total[at - 1] if at else 0
                    stop = max(at + 1, int(np.searchsorted(total, before + _CANDIDATES_AT_ONCE, side="right")))
                    probe = np.repeat(np.arange(at, stop), counts[at:stop])
                    place = np.arange(len(probe)) + np.repeat(
                        start[at:stop] - (total[at:stop] - counts[at:stop] - before), counts[at:stop]
                    )
                    row = order[place]
                    distance = np.bitwise_count(probes[probe] ^ self.hashes[row])
                    near = distance <= MAX_DISTANCE
                    if near.any():
                        yield NearPairs(probe[near], row[near].astype(np.int64), distance[near])
                    at = stop


def _part(hashes: NDArray[np.uint64], part: int) -> NDArray[np.int64]:
    return ((hashes >> np.uint64(part * PART_BITS)) & np.uint64((1 << PART_BITS) - 1)).astype(np.int64)
