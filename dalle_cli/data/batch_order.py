"""The rows of each batch as a pure function of (seed, step), so that a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from dalle_cli.randomness import numpy_generator

WINDOW = 2**18
"""Number of consecutive rows that are shuffled among themselves, so that a store larger than memory is read in large
pieces. The order of the windows is shuffled too."""
REORDER_BLOCK = 8192
"""Number of rows that a ``Reorder`` function gets at a time."""

Reorder = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A function that returns the same rows (n,) in another order, such as one that puts hard negatives together."""


class BatchOrder:
    """Endless epochs over ``rows``; a batch may span two epochs, so that no row is dropped.

    ``rows`` is (n,), ascending; a row that occurs w times counts w epochs in each.
    ``batch_size`` counts all ranks; ``part`` is this rank's slice of each batch.
    ``reorder`` is applied to each REORDER_BLOCK consecutive rows of a shuffled epoch when the block is reached.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        part: slice = slice(None),
        reorder: Reorder | None = None,
    ) -> None:
        if len(rows) == 0:
            raise ValueError("no rows to draw batches from")
        self.rows, self.batch_size, self.seed, self.part, self.reorder = rows, batch_size, seed, part, reorder
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)
        self._seen = lru_cache(maxsize=2)(self._seen_before)
        self._repeats = len(rows) > 1 and bool((np.diff(rows) == 0).any())
        self._block = lru_cache(maxsize=2)(self._reordered_block)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's rows (n,) of the batch that follows ``step`` updates, and the epoch (n,) of each row."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        epochs, places_in_epoch = np.divmod(places, len(self.rows))
        rows, seen = np.empty(len(places), dtype=np.int64), epochs.copy()
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._rows(int(epoch), places_in_epoch[chosen])
            if self._repeats:
                times, before = self._seen(int(epoch))
                seen[chosen] = epoch * times[places_in_epoch[chosen]] + before[places_in_epoch[chosen]]
        return rows, seen

    def _rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.reorder is None:
            whole: np.ndarray = self._epoch(epoch)[places]
            return whole
        rows = np.empty(len(places), dtype=np.int64)
        blocks, offsets = np.divmod(places, REORDER_BLOCK)
        for block in np.unique(blocks):
            rows[blocks == block] = self._block(epoch, int(block))[offsets[blocks == block]]
        return rows

    def _seen_before(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how often the row at each place of an epoch occurs in it, and how often before that place."""
        rows = self._rows(epoch, np.arange(len(self.rows)))
        order = np.argsort(rows, kind="stable")
        _, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
        times, before = np.empty_like(rows), np.empty_like(rows)
        times[order] = np.repeat(counts, counts)
        before[order] = np.arange(len(rows)) - np.repeat(first, counts)
        return times, before

    def _reordered_block(self, epoch: int, block: int) -> np.ndarray:
        assert self.reorder is not None
        rows = self._epoch(epoch)[block * REORDER_BLOCK : (block + 1) * REORDER_BLOCK]
        return self.reorder(rows, numpy_generator(self.seed, "arrange", epoch, block))

    def _shuffled_epoch(self, epoch: int) -> np.ndarray:
        rng = numpy_generator(self.seed, "epoch", epoch)
        borders = np.searchsorted(self.rows, np.arange(WINDOW, self.rows[-1] + 1, WINDOW))
        windows = [window for window in np.split(self.rows, borders) if len(window)]
        return np.concatenate([rng.permutation(windows[i]) for i in rng.permutation(len(windows))])
