"""Which rows make which batch: a pure function of (seed, step), so that a resumed run sees the same batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from dalle_cli.randomness import numpy_generator

WINDOW = 2**18
"""Rows are shuffled within windows of so many consecutive rows of the source and windows among themselves, so that a
store larger than memory is still read in few large reads. A source of one window is shuffled whole."""

REORDER_BLOCK = 8192
"""Rows that are arranged at a time."""
Reorder = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class BatchOrder:
    """Endless epochs over ``rows``, ascending; batches run on across the border of epochs, so no row is dropped.

    ``part`` of each batch is wanted here; other processes take the rest. ``reorder``, if given, puts each
    REORDER_BLOCK consecutive rows of an epoch in another order, when their turn comes.
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
        self._epoch = lru_cache(maxsize=2)(self._permutation)
        self._lot = lru_cache(maxsize=2)(self._arranged)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (n,) of the part and the epoch (n,) that each belongs to, for the update after ``step`` updates."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        epochs, at = np.divmod(places, len(self.rows))
        rows = np.empty(len(places), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._rows(int(epoch), at[chosen])
        return rows, epochs

    def _rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """What stands at ``places`` (n,) of an epoch, (n,)."""
        if self.reorder is None:
            whole: np.ndarray = self._epoch(epoch)[places]
            return whole
        rows = np.empty(len(places), dtype=np.int64)
        lots, within = np.divmod(places, REORDER_BLOCK)
        for lot in np.unique(lots):
            rows[lots == lot] = self._lot(epoch, int(lot))[within[lots == lot]]
        return rows

    def _arranged(self, epoch: int, lot: int) -> np.ndarray:
        assert self.reorder is not None
        rows = self._epoch(epoch)[lot * REORDER_BLOCK : (lot + 1) * REORDER_BLOCK]
        return self.reorder(rows, numpy_generator(self.seed, "arrange", epoch, lot))

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = numpy_generator(self.seed, "epoch", epoch)
        borders = np.searchsorted(self.rows, np.arange(WINDOW, self.rows[-1] + 1, WINDOW))
        windows = [window for window in np.split(self.rows, borders) if len(window)]
        return np.concatenate([rng.permutation(windows[i]) for i in rng.permutation(len(windows))])
