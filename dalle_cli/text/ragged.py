"""Sequences of different lengths in one flat array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """``values`` (total,) are the sequences one behind the other, ``counts`` (n,) int64 their lengths."""

    values: np.ndarray
    counts: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """(n,) where each sequence begins in ``values``."""
        return running_total(self.counts)[:-1]

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """The sequences of all ``parts``, at least one."""
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([part.counts for part in parts]))

    def take(self, which: np.ndarray) -> Ragged:
        """The sequences numbered ``which``, in that order; one may be taken more than once."""
        counts = self.counts[which]
        return Ragged(self.values[spans(self.starts[which], counts)], counts)

    def padded(self, width: int, fill: int = 0) -> np.ndarray:
        """(n, width): what is longer is cut, what is shorter ends in ``fill``."""
        out = np.full((len(self.counts), width), fill, self.values.dtype)
        counts = np.minimum(self.counts, width)
        out.ravel()[spans(np.arange(len(counts)) * width, counts)] = self.values[spans(self.starts, counts)]
        return out


def running_total(counts: np.ndarray) -> np.ndarray:
    """(n,) -> (n + 1,) int64: sums of the first 0, 1, ... n counts."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Flat indices of the ranges from ``starts`` (n,) of ``counts`` (n,) elements each, one range behind the other."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    indices: np.ndarray = np.arange(total) + np.repeat(starts - ends + counts, counts)
    return indices
