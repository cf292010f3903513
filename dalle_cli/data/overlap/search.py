"""Near-duplicates between two sources or within one: copies that were re-encoded, rescaled or slightly cropped.

Perceptual hashes find candidates, and a comparison of thumbnails decides. Pictures that are mirrored, turned, cropped
by more than about 5 % at a side or drawn over are not found, nor are pictures of one colour.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.index import HASH_BYTES, group_by_hash
from dalle_cli.data.overlap.hash_index import HashIndex
from dalle_cli.data.overlap.hashes import (
    VIEWS,
    Hashes,
    Thumbnails,
    comparable,
    hashes,
    similarity,
    similarity_of_view,
    view_hashes,
)
from dalle_cli.data.overlap.thumbnails import read_thumbnails
from dalle_cli.data.source import Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress

SIMILARITY_THRESHOLD = 0.8
"""Similarity from which two pictures count as near-duplicates."""
_CANDIDATE_THRESHOLD = 0.3
"""Minimum similarity of the nearest view for the other views to be compared too.

None of 11,792 altered copies (photographs, textures and drawings) that reach SIMILARITY_THRESHOLD was below it.
"""
_BLOCK = 128


@dataclass(frozen=True)
class UniquePictures:
    """The distinct comparable pictures of a source, each by the first of the rows with an equal thumbnail."""

    thumbnails: Thumbnails
    """(n, SIDE, SIDE, 3) thumbnails of all rows of the source."""
    rows: NDArray[np.int64]
    """(m,) row of each distinct picture."""
    picture_of_row: NDArray[np.int64]
    """(n,) index in ``rows`` of each row's picture; -1 where a row cannot be compared."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def incomparable(self) -> int:
        return int((self.picture_of_row < 0).sum())

    def thumbnails_of(self, pictures: NDArray[np.int64] | range) -> Thumbnails:
        """Return the thumbnails of pictures given by their indices in ``rows``."""
        return self.thumbnails[self.rows[pictures]]


class Pairs(NamedTuple):
    """Near-duplicates as indices of pictures in two ``UniquePictures``; each field is (n,)."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    distance: NDArray[np.int64]
    """Number of bits in which the hashes differ."""
    similarity: NDArray[np.float32]


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
            lines.append(json.dumps(found, ensure_ascii=False) + "\n")
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


def find_overlap(
    train: Source,
    other: Source | None,
    cache: Path,
    *,
    max_pixels: int,
    workers: int,
    threshold: float = SIMILARITY_THRESHOLD,
) -> Overlap:
    """Find the rows of ``train`` with a near-duplicate in ``other``, each with the most similar one.

    Without ``other``, find the rows of ``train`` that repeat an earlier row which is not itself such a repeat, so that
    leaving out the found rows keeps one picture of each group. Near-duplicates have at least the similarity
    ``threshold``. Thumbnails are kept in the folder ``cache``; pictures of more than ``max_pixels`` are not compared.

    Raises:
        UserError: see ``read_thumbnails``.
    """
    a = read_pictures(train, cache, max_pixels=max_pixels, workers=workers)
    b = None if other is None else read_pictures(other, cache, max_pixels=max_pixels, workers=workers)
    pairs = near_duplicates(a, b, workers=workers, threshold=threshold)
    matches = repeats(a, pairs) if b is None else _most_similar(a, b, pairs)
    others = len({match.other for match in matches}) if b is None else int(np.isin(b.picture_of_row, pairs.b).sum())
    return Overlap(train, other or train, a.incomparable, matches, others)


def read_pictures(source: Source, cache: Path, *, max_pixels: int, workers: int) -> UniquePictures:
    """Read the source's thumbnails and group equal ones."""
    thumbnails = read_thumbnails(source, cache, max_pixels=max_pixels, workers=workers)
    usable = np.empty(len(thumbnails), bool)
    digests = bytearray()
    for block in split_blocks(range(len(thumbnails)), _BLOCK):
        part = np.asarray(thumbnails[block.start : block.stop])
        usable[block.start : block.stop] = comparable(part)
        for picture in part:
            digests += blake2b(picture, digest_size=HASH_BYTES).digest()
    items, offsets = group_by_hash(digests)
    first_rows = items[offsets[:-1]]
    usable_groups = usable[first_rows]
    picture_of_row = np.empty(len(thumbnails), dtype=np.int64)
    picture_of_group = np.where(usable_groups, np.cumsum(usable_groups) - 1, -1)
    picture_of_row[items] = np.repeat(picture_of_group, np.diff(offsets))
    return UniquePictures(thumbnails, first_rows[usable_groups], picture_of_row)


def near_duplicates(
    a: UniquePictures, b: UniquePictures | None, *, workers: int, threshold: float = SIMILARITY_THRESHOLD
) -> Pairs:
    """Return each near-duplicate pair once, ordered by ``a`` and ``b``; without ``b``, pairs in ``a`` with a > b."""
    searches = [_Search(a, a, threshold)] if b is None else [_Search(a, b, threshold), _Search(b, a, threshold)]
    found: list[Pairs] = []
    with progress("overlap", sum(len(search.whole) for search in searches), "pictures") as bar:
        for swapped, search in enumerate(searches):
            blocks = split_blocks(range(len(search.whole)), _BLOCK)
            for block, pairs in zip(blocks, map_blocks(search, blocks, workers), strict=True):
                found.append(Pairs(pairs.b, pairs.a, pairs.distance, pairs.similarity) if swapped else pairs)
                bar.advance(len(block))
    first, second = (np.concatenate([np.empty(0, np.int64), *(pairs[i] for pairs in found)]) for i in (0, 1))
    distance = np.concatenate([np.empty(0, np.int64), *(pairs.distance for pairs in found)])
    score = np.concatenate([np.empty(0, np.float32), *(pairs.similarity for pairs in found)])
    if b is None:
        first, second = np.maximum(first, second), np.minimum(first, second)
    order = np.lexsort((distance, -score, second, first))
    best = np.ones(len(order), bool)
    best[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    order = order[best]
    return Pairs(first[order], second[order], distance[order], score[order])


class _Search:
    """Finds the pictures of ``cropped`` that are similar to a view of a picture in a block of ``whole``."""

    def __init__(self, whole: UniquePictures, cropped: UniquePictures, threshold: float) -> None:
        self.whole, self.cropped, self.threshold = whole, cropped, threshold
        parts = [hashes(cropped.thumbnails_of(block)) for block in split_blocks(range(len(cropped)), _BLOCK)]
        self._index = HashIndex(np.concatenate(parts) if parts else np.empty(0, np.uint64))

    def __call__(self, block: range) -> Pairs:
        candidates = self._candidates(view_hashes(self.whole.thumbnails_of(block)))
        first = candidates.probe + block.start
        second, view, distance = candidates.row, candidates.view, candidates.distance
        if self.whole is self.cropped:
            different = first != second
            first, second, view, distance = first[different], second[different], view[different], distance[different]
        score = np.empty(len(first), np.float32)
        for start in range(0, len(first), _BLOCK):
            part = slice(start, start + _BLOCK)
            whole, cropped = self.whole.thumbnails_of(first[part]), self.cropped.thumbnails_of(second[part])
            score[part] = similarity_of_view(whole, cropped, view[part])
            promising = score[part] >= _CANDIDATE_THRESHOLD
            score[part][promising] = similarity(whole[promising], cropped[promising])
        similar = score >= self.threshold
        return Pairs(first[similar], second[similar], distance[similar], score[similar])

    def _candidates(self, views: Hashes) -> _Candidates:
        """Return each pair with near hashes once, by its nearest view; ``views`` is (pictures, VIEWS)."""
        codes = np.empty(0, np.int64)
        for near in self._index.near(views.ravel()):
            picture, view = np.divmod(near.probe, VIEWS)
            more = ((picture * len(self.cropped) + near.row) << 16) | (near.distance.astype(np.int64) << 8) | view
            codes = np.unique(np.concatenate([codes, more]))
            codes = codes[np.diff(codes >> 16, prepend=-1) != 0]
        picture, row = np.divmod(codes >> 16, max(len(self.cropped), 1))
        return _Candidates(picture, row, codes & 0xFF, (codes >> 8) & 0xFF)


class _Candidates(NamedTuple):
    """Pairs with near hashes, each field (n,)."""

    probe: NDArray[np.int64]
    row: NDArray[np.int64]
    view: NDArray[np.int64]
    distance: NDArray[np.int64]


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
