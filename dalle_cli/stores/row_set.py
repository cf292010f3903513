"""Sets of rows of a store or source, with a bit for each row, so that 250 million rows take 31 MB."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.stores.files import write_atomically
from dalle_cli.stores.places import Place

BLOCK = 4096
"""Number of rows that are counted together, and decoded together from a token store."""
CHUNK = 2**20
"""Approximate number of rows that ``chunks`` yields at a time, a multiple of BLOCK."""
LARGE = 64 * BLOCK
"""Number of rows from which on sets that take long to find are kept in files."""
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.uint8)
"""Number of ones in each byte."""


class RowSet:
    """An ascending set of rows, some of which may count several times.

    Args:
        bits: (ceil(n / 8),) uint8, the bits of n rows, lowest first.
        weights: (end, times) of consecutive ranges of rows: the rows up to ``end`` count ``times`` times. Without any,
            each row counts once.
    """

    def __init__(self, bits: np.ndarray, weights: Sequence[tuple[int, int]] = ()) -> None:
        self.bits, self.weights = bits, tuple(weights)
        self._ends, self._times = (np.array([pair[i] for pair in weights], dtype=np.int64) for i in (0, 1))

    @classmethod
    def of(cls, rows: RowSet | np.ndarray) -> RowSet:
        """Return a set of ascending ``rows`` (n,), of which equal ones count several times."""
        if isinstance(rows, RowSet):
            return rows
        distinct, times = np.unique(rows, return_counts=True)
        bits = np.zeros(int(distinct[-1]) // 8 + 1 if len(distinct) else 0, np.uint8)
        np.bitwise_or.at(bits, distinct // 8, (1 << (distinct % 8)).astype(np.uint8))
        last = np.flatnonzero(np.append(np.diff(times) != 0, True)) if len(times) else np.empty(0, int)
        weights = [(int(distinct[i]) + 1, int(times[i])) for i in last]
        return cls(bits, weights if any(count > 1 for _, count in weights) else ())

    @classmethod
    def full(cls, count: int) -> RowSet:
        """Return the rows from 0 up to ``count``."""
        bits = np.full(-(-count // 8), 255, np.uint8)
        if count % 8:
            bits[-1] = 2 ** (count % 8) - 1
        return cls(bits)

    @property
    def repeats(self) -> bool:
        """True if some rows count more or less than once."""
        return bool((self._times != 1).any())

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of rows of each block of BLOCK rows, (blocks,) int64, repeated ones counted as often."""
        whole = np.zeros(-(-len(self.bits) // (BLOCK // 8)) * (BLOCK // 8), np.uint8)
        whole[: len(self.bits)] = _ONES[self.bits]
        counts: np.ndarray = whole.reshape(-1, BLOCK // 8).sum(1, dtype=np.int64)
        if self.repeats:
            counts = np.array([len(self.block(i)) for i in range(len(counts))], dtype=np.int64)
        return counts

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of rows before each block and, last, of all, (blocks + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def block(self, number: int, blocks: int = 1) -> np.ndarray:
        """Return the rows of a block, or of several from it on, ascending, int64."""
        bits = self.bits[number * BLOCK // 8 : (number + blocks) * BLOCK // 8]
        rows = np.flatnonzero(np.unpackbits(bits, bitorder="little")) + number * BLOCK
        return np.repeat(rows, self._times[np.searchsorted(self._ends, rows, side="right")]) if self.repeats else rows

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows, ascending, about CHUNK at a time."""
        for number in range(0, -(-self.stop // BLOCK), CHUNK // BLOCK):
            yield self.block(number, CHUNK // BLOCK)

    @property
    def stop(self) -> int:
        """A number that all rows are below."""
        return 8 * len(self.bits)

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Return whether each of ``rows`` (n,), which are below ``stop``, is in the set."""
        found: np.ndarray = (self.bits[rows // 8] >> (rows % 8).astype(np.uint8)) & 1 > 0
        return found

    def take(self, places: np.ndarray) -> np.ndarray:
        """Return the rows at ``places`` (n,) of the ascending order."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        rows = np.empty(len(places), np.int64)
        for number in np.unique(numbers):
            at = numbers == number
            rows[at] = self.block(int(number))[places[at] - self.starts[number]]
        return rows

    def without(self, rows: np.ndarray) -> RowSet:
        """Return the set without ``rows`` (n,)."""
        bits = self.bits.copy()
        np.bitwise_and.at(bits, rows // 8, ~(1 << (rows % 8)).astype(np.uint8))
        return RowSet(bits, self.weights)

    def below(self, end: int) -> RowSet:
        """Return the rows below ``end``."""
        bits = self.bits[: -(-end // 8)].copy()
        if end % 8 and len(bits) * 8 > end:
            bits[-1] &= 2 ** (end % 8) - 1
        return RowSet(bits, self.weights)

    def weighted(self, weights: Sequence[tuple[int, int]]) -> RowSet:
        """Return the same rows with other ``weights``."""
        return RowSet(self.bits, weights)

    def __iter__(self) -> Iterator[int]:
        for rows in self.chunks():
            yield from rows.tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = list(self.chunks())
        return np.concatenate(parts).astype(dtype or np.int64, copy=False) if parts else np.empty(0, dtype or np.int64)


def read_bits(file: Place, made_of: str, rows: int) -> np.ndarray | None:
    """Return the bits of ``rows`` rows that ``keep_bits`` wrote.

    Returns:
        (ceil(rows / 8),) uint8; None if the file is missing, damaged, or of something else than ``made_of``.
    """
    try:
        line, _, body = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    bits = np.frombuffer(body, np.uint8)
    return bits if len(bits) == -(-rows // 8) and line + b"\n" == _head(made_of, bits) else None


def keep_bits(file: Path, made_of: str, bits: np.ndarray) -> None:
    """Write ``bits``, uint8, for ``read_bits``, unless the folder may not be written to.

    ``made_of`` is a hash of all that the bits depend on. The file holds a line of JSON, then the bits.
    """
    with suppress(OSError, UserError):
        write_atomically(file, _head(made_of, bits) + bits.tobytes())


def _head(made_of: str, bits: np.ndarray) -> bytes:
    return json.dumps({"made_of": made_of, "crc32": zlib.crc32(bits.tobytes())}).encode() + b"\n"
