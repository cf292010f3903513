"""Search for hashes near to given ones without comparing all with all.

Multi-index hashing (Norouzi et al. 2012): two hashes that differ in few bits agree, up to one bit, in one of their
four parts of 16 bits; so only hashes that share such a part are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NEAR = 10
"""Bits in which two hashes may differ. Up to 7 none is missed: of four parts, one then differs in at most 1 bit."""
PARTS = 4
PART_BITS = 16
_FLIPS = np.array([0, *(1 << bit for bit in range(PART_BITS))], dtype=np.int64)
_AT_ONCE = 1 << 21
"""Candidates compared at once; bounds memory when many pictures share a part."""


class Near(NamedTuple):
    """Pairs found: ``probe`` and ``row`` (n,) int64, ``distance`` (n,) in bits; each pair once or more often."""

    probe: NDArray[np.int64]
    row: NDArray[np.int64]
    distance: NDArray[np.uint8]


class HashIndex:
    """Sorted by each of its parts; ``hashes`` (n,) uint64."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self.hashes = hashes
        self._order, self._first = [], []
        for part in range(PARTS):
            values = _part(hashes, part)
            self._order.append(np.argsort(values, kind="stable").astype(np.int32))
            counts = np.bincount(values, minlength=1 << PART_BITS)
            self._first.append(np.concatenate([[0], np.cumsum(counts)]))

    def near(self, probes: NDArray[np.uint64]) -> Iterator[Near]:
        """Rows whose hash differs in at most NEAR bits, in pieces: all up to 7 bits, most of those beyond."""
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
                    stop = max(at + 1, int(np.searchsorted(total, before + _AT_ONCE, side="right")))
                    probe = np.repeat(np.arange(at, stop), counts[at:stop])
                    place = np.arange(len(probe)) + np.repeat(
                        start[at:stop] - (total[at:stop] - counts[at:stop] - before), counts[at:stop]
                    )
                    row = order[place]
                    distance = np.bitwise_count(probes[probe] ^ self.hashes[row])
                    kept = distance <= NEAR
                    if kept.any():
                        yield Near(probe[kept], row[kept].astype(np.int64), distance[kept])
                    at = stop


def _part(hashes: NDArray[np.uint64], part: int) -> NDArray[np.int64]:
    return ((hashes >> np.uint64(part * PART_BITS)) & np.uint64((1 << PART_BITS) - 1)).astype(np.int64)
