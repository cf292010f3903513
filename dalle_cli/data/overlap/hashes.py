"""Perceptual hashes of pictures that survive re-encoding, rescaling and slight crops.

The 64 bits of a hash say which of the 8 x 8 lowest frequencies of the picture's cosine transform (DCT) stand out. A
crop shifts the frequencies, so a picture is also hashed as if it had been cropped: a *view* is the picture without 0,
2.5 or 5 % at each of its four sides. If b was cropped from a by at most that much, some view of a has nearly the hash
of b. Hashes are computed from thumbnails of 32 x 32 pixels, where the transform of a view is a matrix product.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
"""Side of a thumbnail in pixels."""
FREQUENCIES = 8
"""Number of frequencies along each axis that are hashed."""
CUTS = (0.0, 0.025, 0.05)
"""Shares of the picture that a view may leave off at a side."""
INTERVALS = tuple(itertools.product(CUTS, CUTS))
"""Cuts of a view along one axis: (at the start, at the end)."""
VIEWS = len(INTERVALS) ** 2
"""View v x len(INTERVALS) + h is cut by INTERVALS[v] from top and bottom, by INTERVALS[h] from left and right."""
BIT_THRESHOLD = 0.1
"""Share of the mean amplitude above which a bit is set. Above 0, noise in an absent frequency sets no bit."""
MIN_CONTRAST = 2.0
"""Standard deviation of grey levels below which a thumbnail counts as one colour and its hash is noise."""
COMPARISON_SIDE = 16
"""Side in pixels at which two pictures are compared, so coarse that a remaining shift of 1 % matters little."""

_PAIRS_AT_ONCE = 2
"""Number of pairs compared at once, small enough for all their views to fit the cache of a core."""

Thumbnails = NDArray[np.uint8]
"""(n, SIDE, SIDE, 3) uint8."""
Hashes = NDArray[np.uint64]
Floats = NDArray[np.floating[Any]]


def thumbnail(image: Image.Image) -> Thumbnails:
    """Resize an RGB image to (SIDE, SIDE, 3) uint8 whatever its aspect ratio: area average down, bicubic up."""
    method = Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BICUBIC
    return np.asarray(image.resize((SIDE, SIDE), method))


def comparable(thumbnails: Thumbnails) -> NDArray[np.bool_]:
    """Return (n,), true where a picture has enough contrast to be recognised."""
    return np.asarray(_grey(thumbnails).std(axis=(1, 2)) >= MIN_CONTRAST)


def hashes(thumbnails: Thumbnails) -> Hashes:
    """Return the hash of each whole picture, (n,)."""
    return _bits(_grey(thumbnails), _BASES[:1])[:, 0]


def view_hashes(thumbnails: Thumbnails) -> Hashes:
    """Return the hash of each view of each picture, (n, VIEWS); view 0 is the whole picture."""
    return _bits(_grey(thumbnails), _BASES)


def similarity(whole: Thumbnails, cropped: Thumbnails) -> Floats:
    """Return the similarity of ``cropped[i]`` to the most similar view of ``whole[i]``, (n,) from -1 to 1.

    It is the correlation of the two pictures' colour gradients, which ignores contrast and tint but not detail.
    """
    best = np.empty(len(whole), dtype=np.float32)
    n = len(INTERVALS)
    for start in range(0, len(whole), _PAIRS_AT_ONCE):
        pairs = slice(start, start + _PAIRS_AT_ONCE)
        rows = _RESAMPLED.reshape(n * COMPARISON_SIDE, SIDE) @ _channels_first(whole[pairs])
        pictures = rows @ _RESAMPLED.reshape(n * COMPARISON_SIDE, SIDE).T
        views = pictures.reshape(-1, 3, n, COMPARISON_SIDE, n, COMPARISON_SIDE).transpose(0, 2, 4, 1, 3, 5)
        compared = _unit_gradients(views.reshape(-1, VIEWS, 3, COMPARISON_SIDE, COMPARISON_SIDE))
        correlation = compared @ _whole_gradients(cropped[pairs])[..., None]
        best[pairs] = correlation[..., 0].max(axis=1)
    return best


def similarity_of_view(whole: Thumbnails, cropped: Thumbnails, view: NDArray[np.integer]) -> Floats:
    """Return ``similarity`` to a given view (n,) of each picture, which takes a tenth of the time."""
    vertical, horizontal = np.divmod(view, len(INTERVALS))
    rows = _RESAMPLED[vertical][:, None] @ _channels_first(whole)
    views = rows @ _RESAMPLED[horizontal].transpose(0, 2, 1)[:, None]
    return np.asarray((_unit_gradients(views) * _whole_gradients(cropped)).sum(axis=-1))


def _grey(thumbnails: Thumbnails) -> Floats:
    return np.asarray(thumbnails @ np.array([0.299, 0.587, 0.114], dtype=np.float32), dtype=np.float32)


def _bits(grey: Floats, bases: Floats) -> Hashes:
    """Return the hash of each pair of bases (one for each axis), (n, len(bases)^2)."""
    n, views = len(grey), len(bases) ** 2
    found = np.einsum("vki,nij,hlj->nvhkl", bases, grey, bases, optimize=True) * _WHITEN
    found = found.reshape(n, views, FREQUENCIES**2)
    amplitude = np.sqrt(np.square(found).mean(axis=-1, keepdims=True))
    packed = np.packbits(found > BIT_THRESHOLD * amplitude, axis=-1)
    return np.asarray(packed.view(">u8")[..., 0], dtype=np.uint64)


def _basis(cut: tuple[float, float]) -> Floats:
    """Return the cosines over the interval that ``cut`` leaves, 0 outside it: (FREQUENCIES, SIDE)."""
    start, stop = cut[0], 1 - cut[1]
    centre = (np.arange(SIDE) + 0.5) / SIDE
    cosines = np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * (centre - start) / (stop - start))
    return (cosines * _overlaps(np.array([start]), np.array([stop])) / (stop - start)).astype(np.float32)


def _resampling(cut: tuple[float, float]) -> Floats:
    """Return the matrix that averages the interval that ``cut`` leaves by area: (COMPARISON_SIDE, SIDE)."""
    edges = cut[0] + (1 - cut[0] - cut[1]) * np.arange(COMPARISON_SIDE + 1) / COMPARISON_SIDE
    weights = _overlaps(edges[:-1], edges[1:])
    return np.asarray((weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))


def _overlaps(start: Floats, stop: Floats) -> Floats:
    """Return the share of each pixel that lies between ``start`` and ``stop``: (len(start), SIDE)."""
    pixels = np.arange(SIDE + 1) / SIDE
    common = np.minimum(stop[:, None], pixels[1:]) - np.maximum(start[:, None], pixels[:-1])
    return np.asarray(np.clip(common * SIDE, 0, 1))


def _channels_first(thumbnails: Thumbnails) -> Floats:
    return thumbnails.transpose(0, 3, 1, 2).astype(np.float32)


def _whole_gradients(thumbnails: Thumbnails) -> Floats:
    pictures: Floats = _RESAMPLED[0] @ _channels_first(thumbnails) @ _RESAMPLED[0].T
    return _unit_gradients(pictures)


def _unit_gradients(pictures: Floats) -> Floats:
    """Return colour gradients of pictures (..., 3, side, side) as unit vectors (..., d), 0 for one of one colour."""
    flat = (*pictures.shape[:-3], -1)
    gradients = np.concatenate([np.diff(pictures, axis=axis).reshape(flat) for axis in (-2, -1)], axis=-1)
    length = np.sqrt(np.square(gradients).sum(axis=-1, keepdims=True))
    return np.asarray(gradients / np.maximum(length, 1e-6))


_BASES = np.stack([_basis(cut) for cut in INTERVALS])
_RESAMPLED = np.stack([_resampling(cut) for cut in INTERVALS])
# The amplitudes of natural pictures fall with frequency. The constant's weight is 0, so its bit is always 0.
_WHITEN = np.hypot(*np.meshgrid(np.arange(FREQUENCIES), np.arange(FREQUENCIES))).astype(np.float32)
