"""Compact arrays for an index of millions of samples, which pickle fast and are shared by forked processes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b, sha256

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
"""Size of a hash that distinguishes items."""


class PackedStrings:
    """An immutable list of strings, stored as one UTF-8 buffer and the offset of each string in it."""

    def __init__(self, strings: Iterable[str]) -> None:
        data, offsets = bytearray(), array("q", [0])
        for string in strings:
            data += string.encode()
            offsets.append(len(data))
        self._data: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
        self._offsets: NDArray[np.int64] = np.frombuffer(offsets, np.int64)

    @classmethod
    def of(cls, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> PackedStrings:
        """Return the strings whose ``buffers`` these are."""
        strings = cls(())
        strings._data, strings._offsets = data, offsets
        return strings

    def buffers(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return the buffer, uint8, and the offsets in it (n + 1,) int64."""
        return self._data, self._offsets

    def is_whole(self) -> bool:
        """Return whether the offsets lie in the buffer, ascending, and the buffer is UTF-8."""
        ends = self._offsets
        try:
            self._data.tobytes().decode()
        except UnicodeDecodeError:
            return False
        return bool(ends[0] == 0 and ends[-1] == len(self._data) and (np.diff(ends) >= 0).all())

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        return self._data[self._offsets[i] : self._offsets[i + 1]].tobytes().decode()


def hash_string(string: str) -> bytes:
    """Return a hash of HASH_BYTES bytes, which is unique among many millions of strings."""
    return blake2b(string.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


def group_by_hash(hashes: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group n items by their concatenated hashes of HASH_BYTES each; groups are ordered by their first items.

    Returns:
        ``items`` (n,) and ``offsets`` (groups + 1,): group g is ``items[offsets[g]:offsets[g + 1]]``, ascending.
    """
    halves = np.frombuffer(hashes, np.uint64).reshape(-1, HASH_BYTES // 8)
    order = np.lexsort(halves.T)  # stable, so items of a group stay in ascending order
    changes = (np.diff(halves[order], axis=0) != 0).any(axis=1)
    starts = np.flatnonzero(np.concatenate([np.ones(min(len(order), 1), bool), changes]))
    sizes = np.diff(starts, append=len(order))
    by_first = np.argsort(order[starts])
    offsets = np.concatenate([[0], np.cumsum(sizes[by_first])])
    if len(starts) == len(order):
        return np.arange(len(order)), offsets
    # Item j of the result is item j - offsets[g] of the sorted group that comes g-th.
    shift = np.repeat(starts[by_first] - offsets[:-1], sizes[by_first])
    return order[np.arange(len(order)) + shift], offsets


def hash_members(members: Iterable[Iterable[object]]) -> str:
    """Return a SHA-256 of the members of a source in order, each given by its name, its size and the like."""
    digest = sha256()
    for member in members:
        digest.update("\0".join(map(str, member)).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def argsort_strings(strings: Sequence[str]) -> list[int]:
    """Return the indices that sort the strings; the sort is stable."""
    return sorted(range(len(strings)), key=strings.__getitem__)
