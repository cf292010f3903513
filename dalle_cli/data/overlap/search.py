"""Near-duplicates between two sources or within one: copies that were re-encoded, rescaled or slightly cropped.

Perceptual hashes find candidates, and a comparison of thumbnails decides. Pictures that are mirrored, turned, cropped
by more than about 5 % at a side or drawn over are not found, nor are pictures of one colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle_cli.data.overlap.pairs import SIMILARITY_THRESHOLD, Pairs, near_duplicates
from dalle_cli.data.overlap.pictures import UniquePictures, read_pictures
from dalle_cli.data.source import Source
from dalle_cli.progress import printable_json


class Match(NamedTuple):
    """A row of the first source and the row of the other source of which it is a near-duplicate."""

    row: int
    other: int
    distance: int | None
    """Number of bits in which the hashes differ; None if none were compared."""
    similarity: float


@dataclass(frozen=True)
class Overlap:
    """The near-duplicates found in ``source``."""

    source: Source
    other: Source
    """The source it was compared with, which may be ``source`` itself."""
    incomparable: int
    """Number of rows of ``source`` that cannot be compared: unreadable, or of one colour."""
    matches: list[Match]
    """One match for each row of ``source`` that has any, by row."""
    others: int
    """Number of rows of ``other`` with a near-duplicate in ``source``."""

    def to_json_lines(self) -> str:
        lines = []
        for match in self.matches:
            key, other = self.source.key(match.row), self.other.key(match.other)
            distance = {} if match.distance is None else {"distance": match.distance}
            found = {"key": key, "match": other, **distance, "similarity": round(match.similarity, 3)}
            lines.append(printable_json(found) + "\n")
        return "".join(lines)

    def summary(self) -> str:
        if self.source is self.other:
            result = f"{len(self.matches):,} of {len(self.source):,} pictures repeat {self.others:,} earlier ones"
        else:
            result = (
                f"{len(self.matches):,} of {len(self.source):,} pictures are near-duplicates of {self.others:,} of "
                f"{len(self.other):,} in {self.other.name}"
            )
        left = f"; {self.incomparable:,} not compared (unreadable, or of one colour)" if self.incomparable else ""
        return f"{self.source.name}: {result}{left}"


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison."""

    max_pixels: int
    """Number of pixels of the largest picture that is compared."""
    workers: int
    threshold: float = SIMILARITY_THRESHOLD
    """Similarity from which two pictures are near-duplicates."""


def find_overlap(train: Source, other: Source | None, cache: Path, how: Comparison) -> Overlap:
    """Find the rows of ``train`` with a near-duplicate in ``other``, each with the most similar one.

    Without ``other``, find the rows of ``train`` that repeat an earlier row which is not itself such a repeat, so that
    leaving out the found rows keeps one picture of each group. Thumbnails are kept in the folder ``cache``.

    Raises:
        UserError: see ``read_thumbnails``.
    """
    a = read_pictures(train, cache, max_pixels=how.max_pixels, workers=how.workers)
    b = None if other is None else read_pictures(other, cache, max_pixels=how.max_pixels, workers=how.workers)
    pairs = near_duplicates(a, b, workers=how.workers, threshold=how.threshold, folder=cache)
    return overlap_of(train, other, a, b, pairs)


def overlap_of(
    train: Source, other: Source | None, a: UniquePictures, b: UniquePictures | None, pairs: Pairs
) -> Overlap:
    """Return what the near-duplicate pairs of the sources' pictures ``a`` and ``b`` mean for the rows of ``train``."""
    matches = repeats(a, pairs) if b is None else _most_similar(a, b, pairs)
    others = len({match.other for match in matches}) if b is None else int(np.isin(b.picture_of_row, pairs.b).sum())
    return Overlap(train, other or train, a.incomparable, matches, others)


def repeats(a: UniquePictures, pairs: Pairs) -> list[Match]:
    """Return the rows to leave out so that no near-duplicates remain, each matched with a row that stays."""
    original = np.arange(len(a))
    distance, score = np.zeros(len(a), np.int64), np.ones(len(a), np.float32)
    for i in np.lexsort((-pairs.similarity, pairs.a)):
        later, earlier = pairs.a[i], pairs.b[i]
        if original[later] == later and original[earlier] == earlier:
            original[later], distance[later], score[later] = earlier, pairs.distance[i], pairs.similarity[i]
    rows = np.flatnonzero(a.picture_of_row >= 0)
    rows = rows[a.rows[original[a.picture_of_row[rows]]] != rows]
    return [
        Match(int(row), int(a.rows[original[picture]]), int(distance[picture]), float(score[picture]))
        for row, picture in zip(rows, a.picture_of_row[rows], strict=True)
    ]


def _most_similar(a: UniquePictures, b: UniquePictures, pairs: Pairs) -> list[Match]:
    """Return the most similar picture of ``b`` for each row of ``a`` that has any."""
    order = np.lexsort((pairs.b, pairs.distance, -pairs.similarity, pairs.a))
    pictures, best = np.unique(pairs.a[order], return_index=True)
    pair_of = np.full(len(a), -1)
    pair_of[pictures] = order[best]
    rows = np.flatnonzero(a.picture_of_row >= 0)
    rows = rows[pair_of[a.picture_of_row[rows]] >= 0]
    return [
        Match(int(row), int(b.rows[pairs.b[pair]]), int(pairs.distance[pair]), float(pairs.similarity[pair]))
        for row, pair in zip(rows, pair_of[a.picture_of_row[rows]], strict=True)
    ]
