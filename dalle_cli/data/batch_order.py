"""The rows of each batch as a pure function of (seed, step), so that a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.row_set import BLOCK, RowSet

WINDOW_BLOCKS = 64
"""Number of blocks whose rows are shuffled among each other. They are read together, a shard of a store each."""
WINDOW = WINDOW_BLOCKS * BLOCK
"""Number of rows of a window, if all of its rows are wanted."""
REORDER_BLOCK = 8192
"""Number of rows that a ``Reorder`` function gets at a time."""

Order = Literal["random blocks", "consecutive windows"]
"""Name of a way to shuffle an epoch. Runs from before there were random blocks have windows of consecutive rows."""
Reorder = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A function that returns the same rows (n,) in another order, such as one that puts hard negatives together."""


class BatchOrder:
    """Endless epochs over ``rows``; a batch may span two epochs, so that no row is dropped.

    In each epoch the blocks of the rows are shuffled, and the rows of each WINDOW_BLOCKS of them among each other. So
    a store larger than memory is read a shard at a time, and a batch still draws on places all over it. Up to
    WINDOW_BLOCKS blocks all rows are shuffled together.

    ``rows`` is a set, or (n,) ascending; a row that occurs w times counts w epochs in each.
    ``batch_size`` counts all ranks; ``part`` is this rank's slice of each batch.
    ``reorder`` is applied to each REORDER_BLOCK consecutive rows of a shuffled epoch when the block is reached.
    """

    def __init__(
        self,
        rows: RowSet | np.ndarray,
        batch_size: int,
        seed: int,
        part: slice = slice(None),
        reorder: Reorder | None = None,
        order: Order = "random blocks",
    ) -> None:
        self.rows, self.batch_size, self.seed, self.part = RowSet.of(rows), batch_size, seed, part
        self.reorder, self.order = reorder, order
        if len(self.rows) == 0:
            raise ValueError("no rows to draw batches from")
        self._epoch = lru_cache(maxsize=2)(self._windows_of_epoch)
        self._window = lru_cache(maxsize=2)(self._shuffled_window)
        self._consecutive = lru_cache(maxsize=2)(self._consecutive_epoch)
        self._seen = lru_cache(maxsize=2)(self._seen_before)
        self._block = lru_cache(maxsize=2)(self._reordered_block)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's rows (n,) of the batch that follows ``step`` updates, and the epoch (n,) of each row."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        epochs, places_in_epoch = np.divmod(places, len(self.rows))
        rows, seen = np.empty(len(places), dtype=np.int64), epochs.copy()
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._rows(int(epoch), places_in_epoch[chosen])
            if self.rows.repeats:
                times, before = self._seen(int(epoch))
                seen[chosen] = epoch * times[places_in_epoch[chosen]] + before[places_in_epoch[chosen]]
        return rows, seen

    def _rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.reorder is None:
            return self._shuffled(epoch, places)
        rows = np.empty(len(places), dtype=np.int64)
        blocks, offsets = np.divmod(places, REORDER_BLOCK)
        for block in np.unique(blocks):
            rows[blocks == block] = self._block(epoch, int(block))[offsets[blocks == block]]
        return rows

    def _seen_before(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how often the row at each place of an epoch occurs in it, and how often before that place."""
        rows = self._rows(epoch, np.arange(len(self.rows))) if self.reorder is not None else self._whole(epoch)
        order = np.argsort(rows, kind="stable")
        _, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
        times, before = np.empty_like(rows), np.empty_like(rows)
        times[order] = np.repeat(counts, counts)
        before[order] = np.arange(len(rows)) - np.repeat(first, counts)
        return times, before

    def _reordered_block(self, epoch: int, block: int) -> np.ndarray:
        assert self.reorder is not None
        end = min((block + 1) * REORDER_BLOCK, len(self.rows))
        rows = self._shuffled(epoch, np.arange(block * REORDER_BLOCK, end))
        return self.reorder(rows, numpy_generator(self.seed, "arrange", epoch, block))

    def _shuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the rows at ``places`` (n,) of a shuffled epoch."""
        if self.order == "consecutive windows":
            whole: np.ndarray = self._consecutive(epoch)[places]
            return whole
        starts, rows = self._epoch(epoch).starts, np.empty(len(places), dtype=np.int64)
        windows = np.searchsorted(starts, places, side="right") - 1
        for window in np.unique(windows):
            at = windows == window
            rows[at] = self._window(epoch, int(window))[places[at] - starts[window]]
        return rows

    def _whole(self, epoch: int) -> np.ndarray:
        """Return all rows of a shuffled epoch."""
        if self.order == "consecutive windows":
            whole: np.ndarray = self._consecutive(epoch)
            return whole
        windows = range(-(-len(self._epoch(epoch).blocks) // WINDOW_BLOCKS))
        return np.concatenate([self._window(epoch, window) for window in windows])

    def _windows_of_epoch(self, epoch: int) -> _Windows:
        blocks = np.flatnonzero(self.rows.counts)
        if len(blocks) > WINDOW_BLOCKS:
            blocks = self._generator(epoch).permutation(blocks)
        ends = np.cumsum(self.rows.counts[blocks])
        return _Windows(blocks, np.concatenate([[0], ends[WINDOW_BLOCKS - 1 :: WINDOW_BLOCKS], ends[-1:]]))

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        blocks = self._epoch(epoch).blocks
        own = np.sort(blocks[window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS])
        several = len(blocks) > WINDOW_BLOCKS
        rng = numpy_generator(self.seed, "window", epoch, window) if several else self._generator(epoch)
        return rng.permutation(np.concatenate([self.rows.block(int(block)) for block in own]))

    def _consecutive_epoch(self, epoch: int) -> np.ndarray:
        rng, rows = self._generator(epoch), np.asarray(self.rows)
        borders = np.searchsorted(rows, np.arange(WINDOW, rows[-1] + 1, WINDOW))
        windows = [window for window in np.split(rows, borders) if len(window)]
        return np.concatenate([rng.permutation(windows[i]) for i in rng.permutation(len(windows))])

    def _generator(self, epoch: int) -> np.random.Generator:
        return numpy_generator(self.seed, "epoch", epoch)


@dataclass(frozen=True)
class _Windows:
    """The windows of an epoch."""

    blocks: np.ndarray
    """(blocks,) numbers of the blocks, WINDOW_BLOCKS of them to a window."""
    starts: np.ndarray
    """Number of rows before each window and, last, of all."""
