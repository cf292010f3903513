"""Batches of pictures that are alike, so that a contrastive loss has to look at what tells them apart.

Among pictures at random the things in them tell which caption is whose. A CLIP so trained becomes a bag of words: it
knows what is there, and not what is left of what. Neighbours in its batches teach it the rest (Yuksekgonul et al. 2023,
arXiv 2210.01936, who took those of a trained CLIP). Here they are pictures made of the same codes of the dVAE, wherever
these lie: things that were moved are the same codes in other places.
"""

from __future__ import annotations

import numpy as np

from dalle_cli.stores.tokens import TokenReader

BUCKETS = 1024
"""Codes are counted modulo so many."""


class AlikePictures:
    """Puts rows in an order where each ``together`` consecutive ones are pictures made of like codes: ``arrange`` of
    ``training.order.BatchOrder``. The same rows and generator give the same order on every machine.
    """

    def __init__(self, reader: TokenReader, together: int) -> None:
        self.reader, self.together = reader, together

    def __call__(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``rows`` (n,), which come in random order, as groups in random order; rows that make no group stand last.

        It takes about 8 n^2 bytes.
        """
        ordered = rows[neighbours_together(self._bags(rows), self.together)]
        whole = len(rows) // self.together * self.together
        groups = rng.permutation(ordered[:whole].reshape(-1, self.together))
        return np.concatenate([groups.ravel(), ordered[whole:]])

    def _bags(self, rows: np.ndarray) -> np.ndarray:
        """How often each code stands in each picture, (n, buckets) float32; codes that none has are left out."""
        codes = self.reader.read("image", rows).reshape(len(rows), -1).astype(np.int64) % BUCKETS
        bags = np.zeros((len(rows), BUCKETS), np.float32)
        np.add.at(bags, (np.arange(len(rows))[:, None], codes), 1)
        return bags[:, bags.any(0)]


def neighbours_together(points: np.ndarray, together: int) -> np.ndarray:
    """An order of ``points`` (n, d), (n,): the first that is left, with its nearest of those that are left, and so on.

    Of equally near ones the first come first. Points are whole numbers, so that distances are exact, below 2^24, and no
    rounding decides (pictures of up to 53 x 53 codes are as near).
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
        # Which of equal ones a partition takes is the processor's choice, so places decide.
        keys = distances[first, others].astype(np.int64) * len(points) + others
        if together <= len(others):
            keys = np.partition(keys, together - 2)[: together - 1]
        others = np.sort(keys) % len(points)
        left[others] = False
        order += [first, *others]
    return np.array(order)
