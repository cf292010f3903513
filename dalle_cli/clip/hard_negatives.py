"""Batches with hard negatives, so that a contrastive loss has to tell similar pictures apart.

In a batch of random pictures, the objects alone identify the caption. A CLIP trained on such batches becomes a bag of
words: it knows the objects, but not their relations. Yuksekgonul et al. (2023, arXiv 2210.01936) took a trained CLIP's
nearest neighbours as hard negatives. Here they are pictures with similar counts of dVAE codes: an object that moved has
the same codes in other places.
"""

from __future__ import annotations

import numpy as np

from dalle_cli.stores.tokens import TokenReader

BUCKETS = 1024
"""Number of buckets in which codes are counted, modulo."""


class HardNegativeOrder:
    """Reordering of rows, for ``BatchOrder``, into groups of ``group_size`` pictures with similar codes.

    The same rows and generator give the same order on every machine.
    """

    def __init__(self, reader: TokenReader, group_size: int) -> None:
        self.reader, self.group_size = reader, group_size

    def __call__(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return ``rows`` (n,) as groups in random order, an incomplete group last; takes about 8 n^2 bytes."""
        ordered = rows[group_neighbours(self._code_counts(rows), self.group_size)]
        whole = len(rows) // self.group_size * self.group_size
        groups = rng.permutation(ordered[:whole].reshape(-1, self.group_size))
        return np.concatenate([groups.ravel(), ordered[whole:]])

    def _code_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of times each picture uses each code, (n, buckets) float32, without unused codes."""
        codes = self.reader.read("image", rows).reshape(len(rows), -1).astype(np.int64) % BUCKETS
        counts = np.zeros((len(rows), BUCKETS), np.float32)
        np.add.at(counts, (np.arange(len(rows))[:, None], codes), 1)
        return counts[:, counts.any(0)]


def group_neighbours(points: np.ndarray, group_size: int) -> np.ndarray:
    """Return an order (n,) of ``points`` (n, d) that puts nearest neighbours into one group.

    Each group is the first remaining point and its nearest remaining neighbours; of ties the first are taken. Points
    are whole numbers, so squared distances below 2^24 are exact, which covers pictures of up to 53 x 53 codes.
    """
    squares = (points**2).sum(1)
    distances = points @ points.T
    distances *= -2
    distances += squares
    distances += squares[:, None]
    left, order = np.ones(len(points), dtype=bool), []
    for first in range(len(points)):
        if not left[first]:
            continue
        left[first] = False
        others = np.flatnonzero(left)
        # Indices break ties, since the choice of a partition among equals depends on the processor.
        keys = distances[first, others].astype(np.int64) * len(points) + others
        if group_size <= len(others):
            keys = np.partition(keys, group_size - 2)[: group_size - 1]
        others = np.sort(keys) % len(points)
        left[others] = False
        order += [first, *others]
    return np.array(order)
