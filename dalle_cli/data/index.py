"""Lists for indexes of millions of samples: a few bytes an item, in arrays that pickle fast and fork without copies."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16


class PackedStrings:
    """An immutable list of strings: their UTF-8 one behind the other, and where each begins."""

    def __init__(self, strings: Iterable[str]) -> None:
        data, begins = bytearray(), array("q", [0])
        for string in strings:
            data += string.encode()
            begins.append(len(data))
        self._data = np.frombuffer(data, np.uint8)
        self._begins = np.frombuffer(begins, np.int64)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        return self._data[self._begins[i] : self._begins[i + 1]].tobytes().decode()


def hash_string(string: str) -> bytes:
    """HASH_BYTES that stand for the string where it is only to be told apart from millions of others."""
    return blake2b(string.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


def group_by_hash(digests: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of n items are the same, from their n digests one behind the other.

    Returns (items, begins): group g is items[begins[g]:begins[g + 1]], ascending; groups stand in the order of their
    first items. Shapes (n,) and (groups + 1,).
    """
    halves = np.frombuffer(digests, np.uint64).reshape(-1, HASH_BYTES // 8)
    order = np.lexsort(halves.T)  # stable: equal ones stay ascending
    changes = (np.diff(halves[order], axis=0) != 0).any(axis=1)
    starts = np.flatnonzero(np.concatenate([np.ones(min(len(order), 1), bool), changes]))
    sizes = np.diff(starts, append=len(order))
    by_first = np.argsort(order[starts])
    begins = np.concatenate([[0], np.cumsum(sizes[by_first])])
    if len(starts) == len(order):
        return np.arange(len(order)), begins
    # Item j of the result is item (j - begins[g]) of the sorted group that comes g-th.
    shift = np.repeat(starts[by_first] - begins[:-1], sizes[by_first])
    return order[np.arange(len(order)) + shift], begins


def argsort_strings(strings: Sequence[str]) -> list[int]:
    """The places of the strings in their order, equal ones as they come."""
    return sorted(range(len(strings)), key=strings.__getitem__)
