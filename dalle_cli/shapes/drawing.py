"""Drawing of scenes: backgrounds, the outlines of shapes, and anti-aliased silhouettes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dalle_cli.shapes.scene import COLOURS, Scene, counter_rng

BACKGROUND = (255, 255, 255)
_SHADES = (190.0, 245.0)
"""Range of the shade of a background that is not white."""
_SLOPE = 20.0
"""Largest rise of a background's shade from one side to the other."""
_SUPERSAMPLE = 4
"""Number of sample points per pixel along each axis."""


@dataclass(frozen=True)
class Ground:
    """A background's grey level in the middle, 0 to 255, and how much it rises from left to right and downwards."""

    shade: float = 255.0
    right: float = 0.0
    down: float = 0.0

    def pixels(self, size: int) -> NDArray[np.float64]:
        """Return the empty picture, (size, size, 3)."""
        place = (np.arange(size) + 0.5) / size - 0.5
        grey = np.clip(self.shade + self.down * place[:, None] + self.right * place, 0, 255)
        return np.repeat(grey[:, :, None], 3, axis=2)


WHITE = Ground()


def random_ground(seed: int, split: str, index: int) -> Ground:
    """Return the background of a row of a world whose backgrounds are shaded."""
    rng = counter_rng(seed, "ground", split, index)
    return Ground(rng.uniform(*_SHADES), *rng.uniform(-_SLOPE, _SLOPE, 2).tolist())


def _unit_outlines() -> dict[str, NDArray[np.float64]]:
    def ring(radii: list[float], start: float) -> NDArray[np.float64]:
        angles = start + np.arange(len(radii)) * 2 * math.pi / len(radii)
        points: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points *= np.array(radii)[:, None]
        return points

    return {
        "square": np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
        "star": ring([1.0, 0.42] * 5, -math.pi / 2),
        "tee": np.array(
            [(-1.0, -1.0), (1.0, -1.0), (1.0, 0.0), (0.5, 0.0), (0.5, 1.0), (-0.5, 1.0), (-0.5, 0.0), (-1.0, 0.0)]
        ),
        "ell": np.array([(-1.0, -1.0), (0.0, -1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (-1.0, 1.0)]),
        "bar": np.array([(-1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (-1.0, 1.0)]),
        "post": np.array([(-1.0, -1.0), (0.0, -1.0), (0.0, 1.0), (-1.0, 1.0)]),
        "circle": ring([1.0] * 48, 0.0),
        "triangle": ring([1.0] * 3, -math.pi / 2),
    }


OUTLINES = _unit_outlines()
"""Corner points (points, 2) of each shape at radius 1 around (0, 0), y downwards."""


@lru_cache(maxsize=4096)
def coverage(shape: str, x: float, y: float, radius: float, side: int) -> NDArray[np.float64]:
    """Return the share of each pixel that a silhouette covers, (side, side); ``x``, ``y``, ``radius`` in pixels.

    It is sampled at 4 x 4 points per pixel, by the even-odd rule. The array is cached, so it is read-only.
    """
    points = OUTLINES[shape] * radius + np.array([x, y])
    centres = (np.arange(side * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    inside = np.zeros((len(centres), len(centres)), dtype=bool)
    for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0), strict=True):
        rows = (ya > centres) != (yb > centres)
        if rows.any():
            edge = xa + (centres[rows] - ya) * (xb - xa) / (yb - ya)
            inside[rows] ^= centres < edge[:, None]
    share: NDArray[np.float64] = inside.reshape(side, _SUPERSAMPLE, side, _SUPERSAMPLE).mean(axis=(1, 3))
    share.flags.writeable = False
    return share


def paint(picture: NDArray[np.float64], shape: str, x: float, y: float, radius: float, colour: str) -> None:
    """Paint a silhouette onto ``picture`` (height, width, 3) in-place; ``x``, ``y``, ``radius`` in pixels."""
    reach = math.ceil(radius) + 1
    left, top = math.floor(x) - reach, math.floor(y) - reach
    share = coverage(shape, x - left, y - top, radius, 2 * reach + 1)
    height, width, _ = picture.shape
    rows, columns = (slice(max(a, 0), min(a + 2 * reach + 1, n)) for a, n in ((top, height), (left, width)))
    share = share[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    picture[rows, columns] += share * (np.array(COLOURS[colour]) - picture[rows, columns])


def render(scene: Scene, size: int = 64, ground: Ground = WHITE) -> NDArray[np.uint8]:
    """Render a scene as an anti-aliased picture, (size, size, 3) uint8; ``size`` is a multiple of 8, at least 32."""
    if size < 32 or size % 8:
        raise ValueError(f"size {size}: a picture's side is a multiple of 8 and at least 32")
    picture = ground.pixels(size)
    for thing in scene.things:
        paint(picture, thing.shape, thing.x * size, thing.y * size, thing.radius * size, thing.colour)
    return np.rint(picture).astype(np.uint8)
