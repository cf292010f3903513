"""Perceptual hashes of pictures, made to survive re-encoding, rescaling and slight crops.

A hash is 64 bits: which of the 8 x 8 lowest frequencies of the picture's cosine transform (DCT) stand out. A crop
shifts those, so a picture is also hashed as if it had been cropped: a *view* is what lies between cuts of 0, 2.5 or
5 % at each of the four sides. If b was cut from a by at most that much, some view of a has nearly b's hash.
All is computed from thumbnails of 32 x 32 pixels, in which a cropped view's transform is one product of matrices.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Pixels a side of a thumbnail."""
FREQUENCIES = 8
CUTS = (0.0, 0.025, 0.05)
INTERVALS = tuple(itertools.product(CUTS, CUTS))
"""What a view may leave off one axis: (at its start, at its end), as shares of the picture."""
VIEWS = len(INTERVALS) ** 2
"""View v x len(INTERVALS) + h is cut by INTERVALS[v] from top and bottom, by INTERVALS[h] from left and right."""
STANDS_OUT = 0.1
"""A bit is set above this share of the mean amplitude, not above 0: a symmetric drawing has many frequencies that are
0 but for noise, and their bits are to be 0, not noise."""
LEAST_CONTRAST = 2.0
"""Standard deviation of grey levels below which a thumbnail is one colour and its hash is noise."""
COMPARED = 16
"""Pixels a side at which two pictures are compared: coarse, so that a residual shift of 1 % counts little."""

_PAIRS_AT_ONCE = 2
"""So few that all their views fit a core's cache."""

Thumbnails = NDArray[np.uint8]
"""(n, SIDE, SIDE, 3)."""
Hashes = NDArray[np.uint64]
Floats = NDArray[np.floating[Any]]


def thumbnail(image: Image.Image) -> Thumbnails:
    """An RGB image as (SIDE, SIDE, 3) uint8, its aspect ratio forgotten: area average down, bicubic up."""
    method = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BICUBIC
    return np.asarray(image.resize((SIDE, SIDE), method))


def comparable(thumbnails: Thumbnails) -> NDArray[np.bool_]:
    """(n,): whether there is anything in the picture to know it by."""
    return np.asarray(_grey(thumbnails).std(axis=(1, 2)) >= LEAST_CONTRAST)


def hashes(thumbnails: Thumbnails) -> Hashes:
    """(n,): the hash of each whole picture."""
    return _bits(_grey(thumbnails), _BASES[:1])[:, 0]


def view_hashes(thumbnails: Thumbnails) -> Hashes:
    """(n, VIEWS): the hash of each view; view 0 is the whole picture."""
    return _bits(_grey(thumbnails), _BASES)


def similarity(whole: Thumbnails, cut: Thumbnails) -> Floats:
    """(n,) from -1 to 1: how like ``cut[i]`` is to the view of ``whole[i]`` that is most like it.

    The correlation of the two pictures' colour gradients: indifferent to contrast and to tint, not to detail.
    """
    best = np.empty(len(whole), dtype=np.float32)
    n = len(INTERVALS)
    for at in range(0, len(whole), _PAIRS_AT_ONCE):
        pairs = slice(at, at + _PAIRS_AT_ONCE)
        rows = _RESAMPLED.reshape(n * COMPARED, SIDE) @ _channels_first(whole[pairs])
        pictures = rows @ _RESAMPLED.reshape(n * COMPARED, SIDE).T
        views = pictures.reshape(-1, 3, n, COMPARED, n, COMPARED).transpose(0, 2, 4, 1, 3, 5)
        compared = _directions(views.reshape(-1, VIEWS, 3, COMPARED, COMPARED))
        likeness = compared @ _whole_direction(cut[pairs])[..., None]
        best[pairs] = likeness[..., 0].max(axis=1)
    return best


def similarity_of_view(whole: Thumbnails, cut: Thumbnails, view: NDArray[np.integer]) -> Floats:
    """(n,): as ``similarity``, for one given view of each, which takes a tenth of the time."""
    vertical, horizontal = np.divmod(view, len(INTERVALS))
    rows = _RESAMPLED[vertical][:, None] @ _channels_first(whole)
    views = rows @ _RESAMPLED[horizontal].transpose(0, 2, 1)[:, None]
    return np.asarray((_directions(views) * _whole_direction(cut)).sum(axis=-1))


def _grey(thumbnails: Thumbnails) -> Floats:
    return np.asarray(thumbnails @ np.array([0.299, 0.587, 0.114], dtype=np.float32), dtype=np.float32)


def _bits(grey: Floats, bases: Floats) -> Hashes:
    """(n, len(bases)^2)."""
    n, views = len(grey), len(bases) ** 2
    found = np.einsum("vki,nij,hlj->nvhkl", bases, grey, bases, optimize=True) * _WHITEN
    found = found.reshape(n, views, FREQUENCIES**2)
    amplitude = np.sqrt(np.square(found).mean(axis=-1, keepdims=True))
    packed = np.packbits(found > STANDS_OUT * amplitude, axis=-1)
    return np.asarray(packed.view(">u8")[..., 0], dtype=np.uint64)


def _basis(cut: tuple[float, float]) -> Floats:
    """(FREQUENCIES, SIDE): cosines over the interval that ``cut`` leaves, 0 outside it."""
    start, stop = cut[0], 1 - cut[1]
    centre = (np.arange(SIDE) + 0.5) / SIDE
    cosines = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * (centre - start) / (stop - start))
    return (cosines * _overlaps(np.array([start]), np.array([stop])) / (stop - start)).astype(np.float32)


def _resampling(cut: tuple[float, float]) -> Floats:
    """(COMPARED, SIDE): area average of the interval that ``cut`` leaves."""
    edges = cut[0] + (1 - cut[0] - cut[1]) * np.arange(COMPARED + 1) / COMPARED
    weights = _overlaps(edges[:-1], edges[1:])
    return np.asarray((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def _overlaps(start: Floats, stop: Floats) -> Floats:
    """(len(start), SIDE): share of each pixel that lies between ``start`` and ``stop``."""
    pixels = np.arange(SIDE + 1) / SIDE
    common = np.minimum(stop[:, None], pixels[1:]) - np.maximum(start[:, None], pixels[:-1])
    return np.asarray(np.clip(common * SIDE, 0, 1))


def _channels_first(thumbnails: Thumbnails) -> Floats:
    return thumbnails.transpose(0, 3, 1, 2).astype(np.float32)


def _whole_direction(thumbnails: Thumbnails) -> Floats:
    pictures: Floats = _RESAMPLED[0] @ _channels_first(thumbnails) @ _RESAMPLED[0].T
    return _directions(pictures)


def _directions(pictures: Floats) -> Floats:
    """Gradients of (..., 3, COMPARED, COMPARED) as vectors of length 1, or 0 for one colour: (..., d)."""
    flat = (*pictures.shape[:-3], -1)
    gradients = np.concatenate([np.diff(pictures, axis=axis).reshape(flat) for axis in (-2, -1)], axis=-1)
    length = np.sqrt(np.square(gradients).sum(axis=-1, keepdims=True))
    return np.asarray(gradients / np.maximum(length, 1e-6))


_BASES = np.stack([_basis(cut) for cut in INTERVALS])
_RESAMPLED = np.stack([_resampling(cut) for cut in INTERVALS])
# Amplitudes of natural pictures fall with frequency; the constant's weight is 0, so its bit is always 0.
_WHITEN = np.hypot(*np.meshgrid(np.arange(FREQUENCIES), np.arange(FREQUENCIES))).astype(np.float32)
