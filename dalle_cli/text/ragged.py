"""Sequences of different lengths, stored in one flat array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """A list of n sequences: ``values`` (total,) is their concatenation, ``counts`` (n,) int64 holds their lengths."""

    values: np.ndarray
    counts: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Index in ``values`` at which each sequence begins, (n,)."""
        return running_total(self.counts)[:-1]

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """Concatenate the sequences of all ``parts``, of which there is at least one."""
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([part.counts for part in parts]))

    def take(self, indices: np.ndarray) -> Ragged:
        """Return the sequences at ``indices``, in that order; an index may be repeated."""
        counts = self.counts[indices]
        return Ragged(self.values[spans(self.starts[indices], counts)], counts)

    def padded(self, width: int, fill: int = 0) -> np.ndarray:
        """Return the sequences as an (n, width) array: longer ones cut, shorter ones padded with ``fill``."""
        out = np.full((len(self.counts), width), fill, self.values.dtype)
        counts = np.minimum(self.counts, width)
        out.ravel()[spans(np.arange(len(counts)) * width, counts)] = self.values[spans(self.starts, counts)]
        return out


def running_total(counts: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, ..., n of n counts, (n + 1,) int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the indices of n ranges, concatenated; range i has ``counts[i]`` elements from ``starts[i]``."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    indices: np.ndarray = np.arange(total) + np.repeat(starts - ends + counts, counts)
    return indices
