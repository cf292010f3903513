"""Which rows make which batch: a pure function of (seed, step), so that a resumed run sees the same batches."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.training.randomness import numpy_generator

WINDOW = 2**18
"""Rows are shuffled within windows of consecutive rows and windows among themselves, so that a store larger than
memory is still read in few large reads. A set of one window is shuffled whole."""


class BatchOrder:
    """Endless epochs over ``rows``; batches run on across the border of epochs, so no row is dropped."""

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        if len(rows) == 0:
            raise ValueError("no rows to draw batches from")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (batch,) and the epoch (batch,) that each belongs to, for the update after ``step`` updates."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, at = np.divmod(places, len(self.rows))
        rows = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._epoch(int(epoch))[at[chosen]]
        return rows, epochs

    def _permutation(self, epoch: int) -> np.ndarray:
        rng = numpy_generator(self.seed, "epoch", epoch)
        windows = [self.rows[start : start + WINDOW] for start in range(0, len(self.rows), WINDOW)]
        return np.concatenate([rng.permutation(windows[i]) for i in rng.permutation(len(windows))])


def split_holdout(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows): whether a row is held out depends on (seed, row) alone, not on the set's size.

    At least one row is held out when ``share`` > 0 and there are two rows.

    Raises:
        UserError: no row is left to train on.
    """
    x = rows.astype(np.uint64) + np.uint64(seed % 2**32 * 0x9E3779B97F4A7C15 % 2**64)
    # The finaliser of splitmix64 (Steele et al. 2014): a bijection whose high bits are as good as random.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    rank = (x >> np.uint64(11)).astype(np.float64) / 2.0**53
    held = rank < share
    if share > 0 and len(rows) > 1 and not held.any():
        held[int(rank.argmin())] = True
    if len(rows) > 0 and held.all():
        raise UserError(f"data.holdout: {share} leaves none of {len(rows)} samples to train on; lower it")
    return rows[~held], rows[held]
