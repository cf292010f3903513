"""An oracle that measures what a picture of the shapes world shows, without learning and without the caption.

It compares generated pictures with the facts of their captions, so it tolerates the defects of a dVAE: blur, noise and
shifted colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from dalle_cli.shapes.drawing import OUTLINES
from dalle_cli.shapes.scene import COLOURS, SHAPES, SIZES, Claim, Fact

Floats = NDArray[np.float32]

_WORKING_SIDE = 64
"""Side in pixels to which larger pictures are shrunk by a whole factor, so only roughly."""
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_SMOOTHING = 0.4
"""Sigma in pixels of the blur that reduces noise before anything is measured."""
_DISTANCE = 80.0
"""RGB distance from the background from which a pixel belongs to a thing; the palette is 100 or more away."""
_GROUND_RANGE = 60.0
"""Largest RGB distance of the background at the border from its median."""
_MIN_AREA = 0.006
"""Smallest patch, as a share of the picture's area; the smallest thing, a small star, covers 0.019."""
_HALO = 2
"""Number of pixels around a patch that still belong to its soft edge."""
_LEVEL = 1.3
"""Minimum ratio of the distance along a relation's axis to the distance across it."""
_BLURS = (0.6, 1.3)
"""Sigmas in pixels of the templates that a silhouette is compared with."""


@dataclass(frozen=True)
class Detection:
    """A thing seen in a picture; ``x``, ``y`` and ``radius`` are fractions of its side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    confidence: float
    """Intersection over union of the soft silhouette and the best template, 0 to 1."""

    @property
    def fact(self) -> Fact:
        return Fact(self.size, self.colour, self.shape)


def detect(picture: NDArray[np.uint8]) -> list[Detection]:
    """Return the things in a square picture (side, side, 3) uint8, the largest first.

    Raises:
        ValueError: the array has another shape or type.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1]:
        raise ValueError(f"a picture is (side, side, 3), not {picture.shape}")
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture is uint8, not {picture.dtype}")
    if (factor := picture.shape[0] // _WORKING_SIDE) > 1:
        picture = np.asarray(Image.fromarray(picture).reduce(factor))
    pixels = ndimage.gaussian_filter(picture.astype(np.float32), (_SMOOTHING, _SMOOTHING, 0))
    background = _background(pixels)
    difference = pixels - background
    labels, _ = ndimage.label(np.linalg.norm(difference, axis=2) > _DISTANCE)
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        window = tuple(slice(max(s.start - _HALO, 0), s.stop + _HALO) for s in box)
        mask = labels[window] == label
        if mask.sum() >= _MIN_AREA * labels.size:
            found.append(_measure(difference[window], mask, background[window], window, labels.shape[0]))
    return sorted(found, key=lambda thing: -thing.radius)


def _background(pixels: Floats) -> Floats:
    """Return the empty picture (side, side, 3), a plane fitted to the border, of which things cover less than half."""
    side = len(pixels)
    rows, columns = np.indices((side, side)) / side - 0.5
    border = np.ones((side, side), dtype=bool)
    border[1:-1, 1:-1] = False
    median = np.median(pixels[border], axis=0)
    border &= np.linalg.norm(pixels - median, axis=2) <= _GROUND_RANGE
    planes = np.stack([np.ones_like(rows), rows, columns], axis=-1)
    slopes, *_ = np.linalg.lstsq(planes[border], pixels[border].astype(np.float64), rcond=None)
    return np.asarray(planes @ slopes, dtype=np.float32)


def _measure(
    difference: Floats, mask: NDArray[np.bool_], background: Floats, window: tuple[slice, ...], side: int
) -> Detection:
    """Measure a connected patch; its ``background``, ``difference`` from it and ``mask`` are cropped to ``window``."""
    strength = np.linalg.norm(difference, axis=2)
    # The edge of a patch is mixed with the background, so the colour is taken from its full-strength core.
    core = mask & (strength >= 0.85 * np.quantile(strength[mask], 0.9))
    ink = np.median(difference[core], axis=0)
    seen = np.median(background[core], axis=0) + ink
    colour = tuple(COLOURS)[int(np.linalg.norm(_PALETTE - seen, axis=1).argmin())]

    # The soft silhouette is the share of ink, rather than background, in each pixel.
    silhouette = np.clip(difference @ ink / (ink @ ink), 0, 1)
    region = ndimage.binary_dilation(mask, iterations=_HALO)
    silhouette[~region] = 0
    area = float(silhouette.sum())
    rows, columns = np.indices(mask.shape) + 0.5
    centroid = np.array([(silhouette * columns).sum(), (silhouette * rows).sum()]) / area

    fits = (_fit(silhouette, region, shape, centroid, area) for shape in SHAPES)
    overlap, shape, centre, radius = max(fits)
    x, y = (float(c + w.start) / side for c, w in zip(centre, reversed(window), strict=True))
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius / side))
    return Detection(colour, shape, size, x, y, radius / side, overlap)


def _fit(
    silhouette: Floats, region: NDArray[np.bool_], shape: str, centroid: NDArray[np.float64], area: float
) -> tuple[float, str, tuple[float, float], float]:
    """Fit a shape to a silhouette; return their overlap, the shape, and its centre and radius in pixels."""
    unit_area, unit_centroid = _MOMENTS[shape]
    radius = (area / unit_area) ** 0.5
    x, y = (centroid - radius * unit_centroid).tolist()
    height, width = silhouette.shape
    canvas = Image.new("L", (width * 4, height * 4))
    points = (OUTLINES[shape] * radius + np.array([x, y])) * 4 - 0.5
    ImageDraw.Draw(canvas).polygon(points.ravel().tolist(), fill=255)
    template = np.asarray(canvas.reduce(4), dtype=np.float32) / 255
    overlap = 0.0
    for sigma in _BLURS:
        # Cropped like the silhouette, so that ink which the blur moved out of the region is not counted in either.
        blurred = ndimage.gaussian_filter(template, sigma) * region
        both, either = np.minimum(silhouette, blurred).sum(), np.maximum(silhouette, blurred).sum()
        overlap = max(overlap, float(both / either))
    return overlap, shape, (x, y), radius


def _moments(points: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Return the area and the centroid of a polygon (points, 2) by the shoelace formula."""
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    area = cross.sum() / 2
    return abs(float(area)), ((points + following) * cross[:, None]).sum(axis=0) / (6 * area)


_MOMENTS = {shape: _moments(OUTLINES[shape]) for shape in SHAPES}


def relation(a: Detection, b: Detection) -> str | None:
    """Return the relation of ``a`` to ``b``, such as "above" or "left of"; None if neither axis clearly dominates."""
    across, down = b.x - a.x, b.y - a.y
    if abs(down) > _LEVEL * abs(across):
        return "above" if down > 0 else "below"
    if abs(across) > _LEVEL * abs(down):
        return "left of" if across > 0 else "right of"
    return None


def matches_claim(claim: Claim, detections: Sequence[Detection]) -> bool:
    """Return whether the picture shows what is claimed (number of things, attributes, relation) and nothing else."""
    return len(detections) == len(claim.things) and match_score(claim, detections) == 1.0


def match_score(claim: Claim, detections: Sequence[Detection]) -> float:
    """Return the share of the claim's facts that the picture shows, 0 to 1, for the best assignment of things.

    The facts are the number of things, the size, colour and shape of each claimed thing, and the relation if any.
    """
    wanted = len(claim.things)
    facts = 1 + 3 * wanted + (claim.relation is not None)
    # None stands for a thing that is missing from the picture.
    seen: list[Detection | None] = [*detections, *[None] * (wanted - len(detections))]
    best = max(_count_correct(claim, chosen) for chosen in permutations(seen, wanted))
    return (best + (len(detections) == wanted)) / facts


def _count_correct(claim: Claim, chosen: tuple[Detection | None, ...]) -> int:
    correct = 0
    for fact, found in zip(claim.things, chosen, strict=True):
        if found is not None:
            correct += sum(said == seen for said, seen in zip(fact, found.fact, strict=True))
    if claim.relation is not None and len(chosen) == 2:
        a, b = chosen
        correct += a is not None and b is not None and relation(a, b) == claim.relation
    return correct
