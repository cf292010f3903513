"""Gaussian blur of the pictures on both sides of a comparison: FID of what is left when fine detail is gone."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TRUNCATE = 4.0
"""The kernel ends at this many standard deviations."""


def gaussian_blur(pictures: Tensor, radius: float) -> Tensor:
    """Pictures (..., H, W) uint8 blurred by a Gaussian, rounded to uint8; unchanged at radius 0.

    ``radius`` is the standard deviation in pixels, what Pillow's ``GaussianBlur`` calls so. The kernel is the true
    one, cut at four standard deviations; beyond the border stands the border's pixel. Like
    ``scipy.ndimage.gaussian_filter(x, radius, mode="nearest")`` of each channel.
    """
    if pictures.dtype != torch.uint8:
        raise TypeError(f"pictures are uint8, not {pictures.dtype}")
    if radius < 0:
        raise ValueError(f"a blur's radius is 0 or more, not {radius}")
    if radius == 0:
        return pictures
    height, width = pictures.shape[-2:]
    blurred = _operator(height, radius) @ pictures.float() @ _operator(width, radius).T
    return blurred.round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _operator(side: int, radius: float) -> Tensor:
    """The blur along one side as a matrix (side, side), its borders included: rows sum to 1."""
    reach = int(TRUNCATE * radius + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / radius) ** 2)
    weights /= weights.sum()
    sources = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, weights.expand(side, -1)).float()
