"""Pairs of near-duplicates among distinct pictures: candidates by their hashes, checked on their thumbnails.

All views of each picture are hashed first, into a temporary file. Then each worker takes a band, or a part of one: it
indexes the hashes of whole pictures by it, and looks up those of all views. Candidates from all bands are joined and
sorted, so that each is checked once and thumbnails are read in ascending order.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.overlap.hash_index import BandIndex, BandPart, band_parts
from dalle_cli.data.overlap.hashes import VIEWS, Hashes, similarity, similarity_of_view, view_hashes
from dalle_cli.data.overlap.pictures import UniquePictures
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress
from dalle_cli.stores.files import explain_os_errors
from dalle_cli.stores.shards import WHOLE, Shard

SIMILARITY_THRESHOLD = 0.8
"""Similarity from which two pictures count as near-duplicates."""
_CANDIDATE_THRESHOLD = 0.3
"""Minimum similarity of the nearest view for the other views to be compared too.

None of 11,792 altered copies (photographs, textures and drawings) that reach SIMILARITY_THRESHOLD was below it.
"""
_BLOCK = 128
_PROBED_AT_ONCE = 1024
"""Number of pictures whose views are looked up at once, so few that they fit the cache of a core."""
_CHECKED_AT_ONCE = 1024
_INDEX_MEMORY = 1 << 30
"""Bytes that the indexes of all workers together may take."""


class Pairs(NamedTuple):
    """Near-duplicates as indices of pictures in two ``UniquePictures``; each field is (n,)."""

    a: NDArray[np.int64]
    b: NDArray[np.int64]
    distance: NDArray[np.int64]
    """Number of bits in which the hashes differ."""
    similarity: NDArray[np.float32]


class _Candidates(NamedTuple):
    """Pairs with near hashes, by the nearest view of the first picture; each field is (n,)."""

    pair: NDArray[np.int64]
    """Index of the picture that was cut to views x number of the others + index of the other picture."""
    near: NDArray[np.uint16]
    """Number of bits in which the hashes differ x 256 + view."""


_NONE = _Candidates(np.empty(0, np.int64), np.empty(0, np.uint16))


def near_duplicates(
    a: UniquePictures,
    b: UniquePictures | None,
    *,
    workers: int,
    threshold: float = SIMILARITY_THRESHOLD,
    folder: Path | None = None,
    shard: Shard = WHOLE,
) -> Pairs:
    """Return each near-duplicate pair once, ordered by ``a`` and ``b``; without ``b``, pairs in ``a`` with a > b.

    The hashes of all views lie in ``folder`` meanwhile, by default the system's for temporary files: 648 bytes a
    picture. A ``shard`` has the pairs of its share of the pictures with all others, and ``join_pairs`` joins them.

    Raises:
        UserError: the disk is full, or ``folder`` cannot be written.
    """
    found = []
    for whole, cropped in [(a, a)] if b is None else [(a, b), (b, a)]:
        rows = shard.rows(len(whole), _BLOCK)
        with _hashed_views(whole, rows, folder, workers) as views:
            candidates = _find_candidates(views, cropped, whole is cropped, workers)
        pairs = _check(whole, cropped, candidates, threshold, workers)
        found.append(pairs if whole is a else Pairs(pairs.b, pairs.a, pairs.distance, pairs.similarity))
    return join_pairs(found, b is None)


def join_pairs(found: list[Pairs], within: bool) -> Pairs:
    """Return each pair once, with its highest similarity; ``within`` one set of pictures, pairs have a > b."""
    first, second = (np.concatenate([np.empty(0, np.int64), *(pairs[i] for pairs in found)]) for i in (0, 1))
    distance = np.concatenate([np.empty(0, np.int64), *(pairs.distance for pairs in found)])
    score = np.concatenate([np.empty(0, np.float32), *(pairs.similarity for pairs in found)])
    if within:
        first, second = np.maximum(first, second), np.minimum(first, second)
    order = np.lexsort((distance, -score, second, first))
    best = np.ones(len(order), bool)
    best[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    order = order[best]
    return Pairs(first[order], second[order], distance[order], score[order])


@dataclass(frozen=True)
class _Views:
    """The hashes of all views of the pictures ``pictures``, in a file."""

    file: IO[bytes]
    pictures: range

    def read(self, pictures: range) -> Hashes:
        """Return the hashes of some of the pictures, (len(pictures), VIEWS)."""
        size = VIEWS * 8
        start = (pictures.start - self.pictures.start) * size
        return np.frombuffer(os.pread(self.file.fileno(), len(pictures) * size, start), np.uint64).reshape(-1, VIEWS)


@contextmanager
def _hashed_views(whole: UniquePictures, pictures: range, folder: Path | None, workers: int) -> Iterator[_Views]:
    """Hash all views of some pictures into a file without a name, which is gone when the process ends."""
    with explain_os_errors(folder or Path(tempfile.gettempdir())), tempfile.TemporaryFile(dir=folder) as file:
        with progress("overlap: views", len(pictures), "pictures") as bar:
            blocks = split_blocks(pictures, _BLOCK)
            for block, hashed in zip(blocks, map_blocks(_ViewHasher(whole), blocks, workers), strict=True):
                file.write(hashed.tobytes())
                bar.advance(len(block))
        file.flush()
        yield _Views(file, pictures)


@dataclass(frozen=True)
class _ViewHasher:
    whole: UniquePictures

    def __call__(self, block: range) -> Hashes:
        return view_hashes(self.whole.thumbnails_of(block))


def _find_candidates(views: _Views, cropped: UniquePictures, within: bool, workers: int) -> _Candidates:
    """Return the pairs with near hashes, sorted, each by its nearest view."""
    parts = band_parts(len(cropped), _INDEX_MEMORY // workers, workers)
    units = split_blocks(range(len(parts)), 1)
    joined, new = _NONE, [_NONE]
    with progress("overlap: bands", len(units), "parts") as bar:
        for found in map_blocks(_BandSearch(views, cropped.hashes, parts, within), units, workers):
            new.append(found)
            if sum(len(each.pair) for each in new) > len(joined.pair):
                joined, new = _nearest([joined, *new]), []
            bar.advance(1)
    return _nearest([joined, *new])


def _nearest(found: list[_Candidates]) -> _Candidates:
    """Return each pair once, by its nearest view, sorted."""
    pair, near = (np.concatenate([each[i] for each in found]) for i in (0, 1))
    order = np.lexsort((near, pair))
    pair, near = pair[order], near[order]
    first = np.ones(len(pair), bool)
    first[1:] = pair[1:] != pair[:-1]
    return _Candidates(pair[first], near[first])


@dataclass(frozen=True)
class _BandSearch:
    """Finds candidates by some parts of bands."""

    views: _Views
    hashes: Hashes
    parts: list[BandPart]
    within: bool
    """True if the hashes are those of the same pictures, so that a picture is no candidate of its own."""

    def __call__(self, numbers: range) -> _Candidates:
        found = [_NONE]
        for number in numbers:
            index = BandIndex(self.hashes, self.parts[number])
            found += [self._near(index, pictures) for pictures in split_blocks(self.views.pictures, _PROBED_AT_ONCE)]
        return _nearest(found)

    def _near(self, index: BandIndex, pictures: range) -> _Candidates:
        """Return the candidates of some pictures, sorted."""
        codes, others = np.empty(0, np.int64), len(self.hashes)
        for near in index.near(self.views.read(pictures).ravel()):
            picture, view = np.divmod(near.probe, VIEWS)
            more = ((picture * others + near.row) << 16) | (near.distance.astype(np.int64) << 8) | view
            if self.within:
                more = more[picture + pictures.start != near.row]
            codes = np.unique(np.concatenate([codes, more]))
            codes = codes[np.diff(codes >> 16, prepend=-1) != 0]
        return _Candidates((codes >> 16) + pictures.start * others, (codes & 0xFFFF).astype(np.uint16))


def _check(
    whole: UniquePictures, cropped: UniquePictures, candidates: _Candidates, threshold: float, workers: int
) -> Pairs:
    """Return the candidates whose thumbnails are similar."""
    found = []
    with progress("overlap: candidates", len(candidates.pair), "pairs") as bar:
        blocks = split_blocks(range(len(candidates.pair)), _CHECKED_AT_ONCE)
        for block, pairs in zip(
            blocks, map_blocks(_Checker(whole, cropped, candidates, threshold), blocks, workers), strict=True
        ):
            found.append(pairs)
            bar.advance(len(block))
    return join_pairs(found, False)


@dataclass(frozen=True)
class _Checker:
    whole: UniquePictures
    cropped: UniquePictures
    candidates: _Candidates
    threshold: float

    def __call__(self, block: range) -> Pairs:
        own = slice(block.start, block.stop)
        first, second = np.divmod(self.candidates.pair[own], len(self.cropped))
        distance, view = (each.astype(np.int64) for each in np.divmod(self.candidates.near[own], 256))
        score = np.empty(len(first), np.float32)
        for start in range(0, len(first), _BLOCK):
            part = slice(start, start + _BLOCK)
            whole, cropped = self.whole.thumbnails_of(first[part]), self.cropped.thumbnails_of(second[part])
            score[part] = similarity_of_view(whole, cropped, view[part])
            promising = score[part] >= _CANDIDATE_THRESHOLD
            score[part][promising] = similarity(whole[promising], cropped[promising])
        similar = score >= self.threshold
        return Pairs(first[similar], second[similar], distance[similar], score[similar])
