"""Near-duplicates between two sources, or within one: copies that were re-encoded, rescaled or slightly cropped.

Perceptual hashes find candidates, a comparison of thumbnails decides. Pictures that are mirrored, turned, cropped by
more than about 5 % a side or drawn over are not found, nor are those of one colour.
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

SIMILAR = 0.8
"""Similarity from which pictures count as near-duplicates."""
_WORTH_A_LOOK = 0.3
"""Similarity of the candidate's own view from which its neighbours are tried too: of 11,792 altered copies that reach
SIMILAR, photographs, textures and drawings, none had less."""
_BLOCK = 128


@dataclass(frozen=True)
class Pictures:
    """A source's thumbnails, each different one once."""

    thumbnails: Thumbnails
    rows: NDArray[np.int64]
    """(m,) the comparable rows, the first of those with equal thumbnails."""
    first: NDArray[np.int64]
    """(n,) for each row the place in ``rows`` of its equal; -1 where a row cannot be compared."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def incomparable(self) -> int:
        return int((self.first < 0).sum())

    def at(self, places: NDArray[np.int64] | range) -> Thumbnails:
        return self.thumbnails[self.rows[places]]


class Pairs(NamedTuple):
    """Near-duplicates as places in two ``Pictures``: ``a``, ``b``, ``distance`` in bits, ``similarity``, all (n,)."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    distance: NDArray[np.int64]
    similarity: NDArray[np.float32]


class Match(NamedTuple):
    """A row of the first source and the row that it is a near-duplicate of."""

    row: int
    other: int
    distance: int
    similarity: float


@dataclass(frozen=True)
class Overlap:
    """What was compared, and one match for each row of ``source`` that has any, by row."""

    source: Source
    other: Source
    """``source`` itself where it was compared with itself."""
    incomparable: int
    matches: list[Match]
    others: int
    """Rows of ``other`` that are a near-duplicate of any."""

    def lines(self) -> str:
        """JSON Lines, one a match."""
        lines = []
        for match in self.matches:
            key, other = self.source.key(match.row), self.other.key(match.other)
            found = {"key": key, "match": other, "distance": match.distance, "similarity": round(match.similarity, 3)}
            lines.append(json.dumps(found, ensure_ascii=False) + "\n")
        return "".join(lines)

    def summary(self) -> str:
        """One line for people."""
        if self.source is self.other:
            told = f"{len(self.matches):,} of {len(self.source):,} pictures repeat {self.others:,} earlier ones"
        else:
            told = (
                f"{len(self.matches):,} of {len(self.source):,} pictures are near-duplicates of {self.others:,} of "
                f"{len(self.other):,} in {self.other.name}"
            )
        left = f"; {self.incomparable:,} not compared (unreadable, or of one colour)" if self.incomparable else ""
        return f"{self.source.name}: {told}{left}"


def find_overlap(
    train: Source, other: Source | None, cache: Path, *, max_pixels: int, workers: int, similar: float = SIMILAR
) -> Overlap:
    """The rows of ``train`` with a near-duplicate in ``other``, each with the one it is most like.

    Without ``other``, the rows of ``train`` that are near-duplicates of an earlier row which is none itself: leaving
    them out leaves one of each. Thumbnails of both are kept in ``cache``.

    Raises:
        UserError: see ``read_thumbnails``.
    """
    a = read_pictures(train, cache, max_pixels=max_pixels, workers=workers)
    b = None if other is None else read_pictures(other, cache, max_pixels=max_pixels, workers=workers)
    pairs = near_duplicates(a, b, workers=workers, similar=similar)
    matches = _later_of_each(a, pairs) if b is None else _nearest(a, b, pairs)
    others = len({match.other for match in matches}) if b is None else int(np.isin(b.first, pairs.b).sum())
    return Overlap(train, other or train, a.incomparable, matches, others)


def read_pictures(source: Source, cache: Path, *, max_pixels: int, workers: int) -> Pictures:
    """The source's thumbnails, read, and equal ones joined."""
    thumbnails = read_thumbnails(source, cache, max_pixels=max_pixels, workers=workers)
    usable = np.empty(len(thumbnails), bool)
    digests = bytearray()
    for block in split_blocks(range(len(thumbnails)), _BLOCK):
        part = np.asarray(thumbnails[block.start : block.stop])
        usable[block.start : block.stop] = comparable(part)
        for picture in part:
            digests += blake2b(picture, digest_size=HASH_BYTES).digest()
    items, begins = group_by_hash(digests)
    firsts = items[begins[:-1]]
    kept = usable[firsts]
    first = np.empty(len(thumbnails), dtype=np.int64)
    first[items] = np.repeat(np.where(kept, np.cumsum(kept) - 1, -1), np.diff(begins))
    return Pictures(thumbnails, firsts[kept], first)


def near_duplicates(a: Pictures, b: Pictures | None, *, workers: int, similar: float = SIMILAR) -> Pairs:
    """All pairs, each once, ordered by ``a`` and ``b``; without ``b`` those within ``a``, with a > b."""
    searches = [_Search(a, b or a, similar)] if b is None else [_Search(a, b, similar), _Search(b, a, similar)]
    found: list[Pairs] = []
    with progress("overlap", sum(len(search.whole) for search in searches), "pictures") as bar:
        for turned, search in enumerate(searches):
            blocks = split_blocks(range(len(search.whole)), _BLOCK)
            for block, pairs in zip(blocks, map_blocks(search, blocks, workers), strict=True):
                found.append(Pairs(pairs.b, pairs.a, pairs.distance, pairs.similarity) if turned else pairs)
                bar.advance(len(block))
    one, two = (np.concatenate([np.empty(0, np.int64), *(pairs[i] for pairs in found)]) for i in (0, 1))
    distance = np.concatenate([np.empty(0, np.int64), *(pairs.distance for pairs in found)])
    likeness = np.concatenate([np.empty(0, np.float32), *(pairs.similarity for pairs in found)])
    if b is None:
        one, two = np.maximum(one, two), np.minimum(one, two)
    order = np.lexsort((distance, -likeness, two, one))
    best = np.ones(len(order), bool)
    best[1:] = (np.diff(one[order]) != 0) | (np.diff(two[order]) != 0)
    order = order[best]
    return Pairs(one[order], two[order], distance[order], likeness[order])


class _Search:
    """Pairs of a block of ``whole`` with pictures of ``cut`` that are like a view of them."""

    def __init__(self, whole: Pictures, cut: Pictures, similar: float) -> None:
        self.whole, self.cut, self.similar = whole, cut, similar
        parts = [hashes(cut.at(block)) for block in split_blocks(range(len(cut)), _BLOCK)]
        self._index = HashIndex(np.concatenate(parts) if parts else np.empty(0, np.uint64))

    def __call__(self, block: range) -> Pairs:
        probe, row, view, distance = self._candidates(view_hashes(self.whole.at(block)))
        one = probe + block.start
        if self.whole is self.cut:
            other = one != row
            one, row, view, distance = one[other], row[other], view[other], distance[other]
        likeness = np.empty(len(one), np.float32)
        for at in range(0, len(one), _BLOCK):
            part = slice(at, at + _BLOCK)
            whole, cut = self.whole.at(one[part]), self.cut.at(row[part])
            likeness[part] = similarity_of_view(whole, cut, view[part])
            worth = likeness[part] >= _WORTH_A_LOOK
            likeness[part][worth] = similarity(whole[worth], cut[worth])
        like = likeness >= self.similar
        return Pairs(one[like], row[like], distance[like], likeness[like])

    def _candidates(self, views: Hashes) -> tuple[NDArray[np.int64], ...]:
        """(picture, row, view, distance) of each pair with near hashes, by its nearest view."""
        codes = np.empty(0, np.int64)
        for near in self._index.near(views.ravel()):
            picture, view = np.divmod(near.probe, VIEWS)
            more = ((picture * len(self.cut) + near.row) << 16) | (near.distance.astype(np.int64) << 8) | view
            codes = np.unique(np.concatenate([codes, more]))
            codes = codes[np.diff(codes >> 16, prepend=-1) != 0]
        picture, row = np.divmod(codes >> 16, max(len(self.cut), 1))
        return picture, row, codes & 0xFF, (codes >> 8) & 0xFF


def _later_of_each(a: Pictures, pairs: Pairs) -> list[Match]:
    """Rows to leave out so that no two near-duplicates are left, each with one that is left."""
    original = np.arange(len(a))
    distance, likeness = np.zeros(len(a), np.int64), np.ones(len(a), np.float32)
    for i in np.lexsort((-pairs.similarity, pairs.a)):
        later, earlier = pairs.a[i], pairs.b[i]
        if original[later] == later and original[earlier] == earlier:
            original[later], distance[later], likeness[later] = earlier, pairs.distance[i], pairs.similarity[i]
    rows = np.flatnonzero(a.first >= 0)
    rows = rows[a.rows[original[a.first[rows]]] != rows]
    return [
        Match(int(row), int(a.rows[original[place]]), int(distance[place]), float(likeness[place]))
        for row, place in zip(rows, a.first[rows], strict=True)
    ]


def _nearest(a: Pictures, b: Pictures, pairs: Pairs) -> list[Match]:
    order = np.lexsort((pairs.b, pairs.distance, -pairs.similarity, pairs.a))
    places, best = np.unique(pairs.a[order], return_index=True)
    pair_of = np.full(len(a), -1)
    pair_of[places] = order[best]
    rows = np.flatnonzero(a.first >= 0)
    rows = rows[pair_of[a.first[rows]] >= 0]
    return [
        Match(int(row), int(b.rows[pairs.b[pair]]), int(pairs.distance[pair]), float(pairs.similarity[pair]))
        for row, pair in zip(rows, pair_of[a.first[rows]], strict=True)
    ]
