"""Near-duplicates by the features of a network, which finds mirror images and stronger crops (paper, section 3.2).

It misses blurred and grey copies, which perceptual hashes find: see docs/evaluation.md for both.
Each picture is compared with all others: the similarity of two is the cosine of their features. The features of m
pictures take 4 d m bytes of memory, and the comparison with n others m n d products.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dalle_cli.data.images import MAX_PIXELS, BadImage, decode_image
from dalle_cli.data.overlap.search import Match, Overlap
from dalle_cli.data.source import BadSample, Source
from dalle_cli.fid.features import Features, cached_features
from dalle_cli.fid.pictures import PictureSubset, SourcePictures
from dalle_cli.progress import progress

SIDE = 256
"""Side in pixels to which pictures are cropped and resized for the network."""
THRESHOLD = 0.9
"""Similarity from which two pictures count as near-duplicates, unless another is given."""
BLOCK = 512
"""Number of pictures that are compared with all others at once."""


@dataclass(frozen=True)
class _Vectors:
    """Features of the readable pictures of a source, as unit vectors (m, d), and their rows (m,)."""

    rows: NDArray[np.int64]
    unit: Tensor


def find_nearest(
    source: Source, other: Source | None, features: Features, cache: Path, *, max_pixels: int, threshold: float
) -> Overlap:
    """Find the rows of ``source`` with a near-duplicate in ``other``, each with the nearest one.

    Without ``other``, find the rows that repeat an earlier row which is not itself such a repeat. Pictures that cannot
    be read, or have more than ``max_pixels``, are not compared.

    Raises:
        UserError: the folder ``cache`` cannot be written.
    """
    a = _read(source, features, cache, max_pixels)
    if other is None:
        matches = _repeats(a, threshold)
        others = len({match.other for match in matches})
    else:
        matches, others = _closest(a, _read(other, features, cache, max_pixels), threshold)
    return Overlap(source, other or source, len(source) - len(a.rows), matches, others)


def _read(source: Source, features: Features, cache: Path, max_pixels: int) -> _Vectors:
    rows, digests = [], []
    with progress("overlap: reading", len(source), "pictures") as bar:
        for row in range(len(source)):
            try:
                content = source.image_bytes(row)
                decode_image(content, min(max_pixels, MAX_PIXELS))
            except (BadSample, BadImage):
                pass
            else:
                rows.append(row)
                digests.append(hashlib.sha256(content).hexdigest())
            bar.advance()
    pictures = PictureSubset(SourcePictures(source, SIDE), rows)
    with progress(f"overlap: {features.name.split()[0]} features", len(rows), "pictures") as bar:
        found = cached_features(pictures, digests, features, cache, bar=bar)
        vectors = found.whole().vectors if rows else torch.empty(0, 1)
    return _Vectors(np.array(rows, np.int64), torch.nn.functional.normalize(vectors, dim=1))


def _closest(a: _Vectors, b: _Vectors, threshold: float) -> tuple[list[Match], int]:
    """Return the match of each row of ``a`` that has one, and the number of rows of ``b`` that match any."""
    matches: list[Match] = []
    matched = torch.zeros(len(b.rows), dtype=torch.bool)
    for start in range(0, len(a.rows) if len(b.rows) else 0, BLOCK):
        cosines = a.unit[start : start + BLOCK] @ b.unit.T
        matched |= (cosines >= threshold).any(0)
        best, place = cosines.max(1)
        matches += [
            Match(int(a.rows[start + i]), int(b.rows[place[i]]), None, float(best[i]))
            for i in torch.nonzero(best >= threshold)[:, 0].tolist()
        ]
    return matches, int(matched.sum())


def _repeats(a: _Vectors, threshold: float) -> list[Match]:
    """Return the rows that repeat an earlier one that stays."""
    matches, stays = [], torch.ones(len(a.rows), dtype=torch.bool)
    for start in range(0, len(a.rows), BLOCK):
        cosines = a.unit[start : start + BLOCK] @ a.unit.T
        for i, row in enumerate(cosines, start):
            earlier = row[:i].masked_fill(~stays[:i], -1.0)
            if i and float(earlier.max()) >= threshold:
                stays[i] = False
                matches.append(Match(int(a.rows[i]), int(a.rows[earlier.argmax()]), None, float(earlier.max())))
    return matches
