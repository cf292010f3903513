"""Search for near hashes without comparing all pairs, by bands of bits that near hashes have in common.

The bits of a hash are dealt into seven groups. A band is the bits of three groups, of which there are 35. If two hashes
differ in at most 4 bits, then at least three groups are equal, and so is a band. Only hashes with an equal band are
compared. Bands have 27 bits or more, so that few pictures share one by chance, even among millions. The nearest of a
picture's views rarely differs in more bits: of 5,500 photographs and drawings that were re-encoded, rescaled, darkened
and cropped by up to 5 %, this finds all but 5. With pairs up to 10 bits apart it would find 3 of these too, and compare
ten times as many pairs that are near by chance. Of 700 photographs cropped by 10 % it finds 93 %.

Bands are searched one after another, each with an index of its own. If even one index is too large for the memory, a
band is searched in parts: a part has the hashes whose key, a number that stands for their bits in the band, begins with
given bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_DISTANCE = 8
"""Maximum number of bits in which near hashes differ."""
SURE_DISTANCE = 4
"""Number of differing bits up to which no pair is missed, unless more than LARGEST_RUN hashes share each band."""
LARGEST_RUN = 2048
"""Number of hashes with an equal band, the first ones, that a probe is compared with.

It keeps many pictures that are nearly the same, such as placeholders, from taking time that grows with their square.
"""
INDEX_BYTES = 36
"""Memory that the index of a band takes for each hash while it is made; then it is 18 bytes at most."""
_GROUPS = [sum(1 << bit for bit in range(start, 64, 7)) for start in range(7)]
"""Bits of each group, dealt in turn, since neighbouring bits are alike."""
BANDS = [np.uint64(a | b | c) for a, b, c in combinations(_GROUPS, 3)]
_MIX = np.uint64(0x9E3779B97F4A7C15)
_KEY_BITS = 32
_ROWS_AT_ONCE = 1 << 16
_CANDIDATES_AT_ONCE = 1 << 21
"""Number of candidates compared at once, which bounds memory when many hashes share a band."""


class BandPart(NamedTuple):
    """A band, or the part of it with the keys whose first ``bits`` bits are ``part``."""

    band: int
    part: int = 0
    bits: int = 0


class NearPairs(NamedTuple):
    """Pairs of a probe and a row of the index, with the number of bits that differ, each (n,); pairs may repeat."""

    probe: NDArray[np.int64]
    row: NDArray[np.int64]
    distance: NDArray[np.uint8]


def band_parts(hashes: int, memory: int, at_least: int = 1) -> list[BandPart]:
    """Return the parts that all bands are searched in: the fewest, of at most ``memory`` bytes each."""
    bits = 0
    while bits < 16 and (len(BANDS) << bits < at_least or hashes * INDEX_BYTES >> bits > memory):
        bits += 1
    return [BandPart(band, part, bits) for band in range(len(BANDS)) for part in range(1 << bits)]


class BandIndex:
    """An index of those of ``hashes`` (n,) uint64, n < 2^32, that are in a part of a band.

    Keys are sorted, with their rows. A filter has a bit for any beginning that a key may have, about ten for each key,
    that is set if one begins so. Most probes end there. A table of shorter beginnings, one or two for each key, says
    where to look for the others.
    """

    def __init__(self, hashes: NDArray[np.uint64], part: BandPart) -> None:
        self.hashes, self.part = hashes, part
        self._sorted = self._sort(hashes)
        keys = (self._sorted >> np.uint64(_KEY_BITS)).astype(np.uint32)
        self._bits = min(max(len(keys).bit_length(), 1), _KEY_BITS - part.bits)
        self._filter_bits = min(self._bits + 3, _KEY_BITS - part.bits)
        self._filter = self._bits_of(self._bucket(keys, self._filter_bits))
        self._table = np.zeros((1 << self._bits) + 1, np.uint32)
        # Of the keys of a bucket the last one's assignment stays; an empty bucket ends where the one before it does.
        ends = self._bucket(keys, self._bits) + np.uint32(1)
        self._table[ends] = np.arange(1, len(keys) + 1, dtype=np.uint32)
        np.maximum.accumulate(self._table, out=self._table)

    def _sort(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return key x 2^32 + row of each hash in the part, sorted."""
        found = [np.empty(0, np.uint64)]
        for start in range(0, len(hashes), _ROWS_AT_ONCE):
            keys = _keys_of(hashes[start : start + _ROWS_AT_ONCE], BANDS[self.part.band])
            rows = self._own(keys)
            found.append((keys[rows].astype(np.uint64) << np.uint64(_KEY_BITS)) | (rows + start).astype(np.uint64))
        packed = np.concatenate(found)
        packed.sort()
        return packed

    def _own(self, keys: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the places of the keys that are in the part."""
        if not self.part.bits:
            return np.arange(len(keys))
        return np.flatnonzero(keys >> np.uint32(_KEY_BITS - self.part.bits) == self.part.part)

    def _bucket(self, keys: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
        """Return the first ``bits`` bits of each key after those of the part."""
        return (keys << np.uint32(self.part.bits)) >> np.uint32(_KEY_BITS - bits)

    def _bits_of(self, buckets: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Return a bit for each bucket, set for those in ``buckets``, which are sorted."""
        found = np.zeros((1 << self._filter_bits >> 3) + 1, np.uint8)
        places = buckets >> np.uint32(3)
        first = np.ones(len(places), bool)
        first[1:] = places[1:] != places[:-1]
        starts = np.flatnonzero(first)
        if len(starts):
            bits = np.uint8(1) << (buckets & np.uint32(7)).astype(np.uint8)
            found[places[starts]] = np.bitwise_or.reduceat(bits, starts)
        return found

    def near(self, probes: NDArray[np.uint64]) -> Iterator[NearPairs]:
        """Yield, in chunks, rows that are equal to a probe in the band and within MAX_DISTANCE of it."""
        keys = _keys_of(probes, BANDS[self.part.band])
        own = self._own(keys)
        bucket = self._bucket(keys[own], self._filter_bits)
        there = self._filter[bucket >> np.uint32(3)] >> (bucket & np.uint32(7)).astype(np.uint8) & np.uint8(1)
        asked = own[np.flatnonzero(there)]
        start, counts = self._find(keys[asked])
        total = np.cumsum(counts)
        at = 0
        while at < len(asked):
            before = total[at - 1] if at else 0
            stop = max(at + 1, int(np.searchsorted(total, before + _CANDIDATES_AT_ONCE, side="right")))
            chunk = slice(at, stop)
            probe = np.repeat(asked[chunk], counts[chunk])
            shift = start[chunk] - (total[chunk] - counts[chunk] - before)
            found = self._sorted[np.arange(len(probe)) + np.repeat(shift, counts[chunk])]
            same = (found >> np.uint64(_KEY_BITS)).astype(np.uint32) == keys[probe]
            probe, row = probe[same], found[same].astype(np.uint32).astype(np.int64)
            distance = np.bitwise_count(probes[probe] ^ self.hashes[row])
            near = distance <= MAX_DISTANCE
            if near.any():
                yield NearPairs(probe[near], row[near], distance[near])
            at = stop

    def _find(self, keys: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where to look for each key among the sorted ones, and how many of them to look at."""
        bucket = self._bucket(keys, self._bits)
        start = self._table[bucket].astype(np.int64)
        counts = self._table[bucket + np.uint32(1)] - start
        large = np.flatnonzero(counts > LARGEST_RUN)
        if len(large):  # look at the first ones of the very key, not of all that are in the same bucket
            least = keys[large].astype(np.uint64) << np.uint64(_KEY_BITS)
            start[large] = np.searchsorted(self._sorted, least)
            stop = np.searchsorted(self._sorted, least | np.uint64((1 << _KEY_BITS) - 1), side="right")
            counts[large] = np.minimum(stop - start[large], LARGEST_RUN)
        return start, counts


def _keys_of(hashes: NDArray[np.uint64], band: np.uint64) -> NDArray[np.uint32]:
    """Return 32 bits that stand for each hash's bits in ``band``; few others have the same."""
    return (((hashes & band) * _MIX) >> np.uint64(_KEY_BITS)).astype(np.uint32)
