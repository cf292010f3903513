"""Batches with hard negatives, so that a contrastive loss has to learn what tells similar pictures apart.

In a batch of random pictures, the things in them are enough to match captions. A CLIP trained on such batches becomes a
bag of words: it knows what is in a picture, but not what is left of what. Hard negatives teach it the rest. Yuksekgonul
et al. (2023, arXiv 2210.01936) took the nearest neighbours by a trained CLIP. Here they are pictures made of the same
dVAE codes, wherever the codes lie: a thing that was moved is the same codes in other places.
"""

from __future__ import annotations

import numpy as np

from dalle_cli.stores.tokens import TokenReader

BUCKETS = 1024
"""Number of buckets that codes are counted in, modulo."""


class HardNegativeOrder:
    """Order of rows in which each group of consecutive rows holds pictures made of similar codes.

    It is the ``reorder`` of ``data.batch_order.BatchOrder``. The same rows and generator give the same order on every
    machine.

    Args:
        reader: the token store with the codes.
        group_size: number of pictures in a group.
    """

    def __init__(self, reader: TokenReader, group_size: int) -> None:
        self.reader, self.group_size = reader, group_size

    def __call__(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Reorder ``rows`` (n,), given in random order, by groups in random order; an incomplete group comes last.

        It takes about 8 n^2 bytes.
        """
        ordered = rows[group_neighbours(self._code_counts(rows), self.group_size)]
        whole = len(rows) // self.group_size * self.group_size
        groups = rng.permutation(ordered[:whole].reshape(-1, self.group_size))
        return np.concatenate([groups.ravel(), ordered[whole:]])

    def _code_counts(self, rows: np.ndarray) -> np.ndarray:
        """Return how often each picture uses each code, (n, buckets) float32, without the codes that none uses."""
        codes = self.reader.read("image", rows).reshape(len(rows), -1).astype(np.int64) % BUCKETS
        counts = np.zeros((len(rows), BUCKETS), np.float32)
        np.add.at(counts, (np.arange(len(rows))[:, None], codes), 1)
        return counts[:, counts.any(0)]


def group_neighbours(points: np.ndarray, group_size: int) -> np.ndarray:
    """Return an order (n,) of ``points`` (n, d) that puts nearest neighbours into one group.

    Each group is the first point not yet taken and the nearest of the others not yet taken; of equally near ones the
    first are taken. Points hold whole numbers, so squared distances are exact below 2^24 and no rounding decides. That
    covers pictures of up to 53 x 53 codes.
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
        # Places break ties: which of equal ones a partition takes would depend on the processor.
        keys = distances[first, others].astype(np.int64) * len(points) + others
        if group_size <= len(others):
            keys = np.partition(keys, group_size - 2)[: group_size - 1]
        others = np.sort(keys) % len(points)
        left[others] = False
        order += [first, *others]
    return np.array(order)
