"""Structural similarity of images (Wang et al. 2004, "Image Quality Assessment", IEEE TIP 13(4))."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
"""(K1 L)^2 and (K2 L)^2 of the paper, for pixels of range L = 1."""


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean SSIM of each pair of images, (B, C, H, W) floating on the scale 0..1 -> (B,).

    In each channel, means, variances and the covariance are weighted by a Gaussian window, at every position where the
    window lies inside the image. The resulting map is averaged over positions and channels. In an image smaller than
    the window, the window shrinks to the image's size.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"ssim takes two images of one shape (B, C, H, W), not {tuple(a.shape)} and {tuple(b.shape)}")
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a * mean_a
    variance_b = _blur(b * b) - mean_b * mean_b
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a * mean_a + mean_b * mean_b + C1)
    contrast_and_structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (luminance * contrast_and_structure).mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Return the window's weighted means by a vertical and a horizontal convolution: (B, C, H, W) -> (B, C, H', W')."""
    batch, channels, height, width = x.shape
    maps = x.reshape(batch * channels, 1, height, width)
    down, across = (_gaussian(min(WINDOW, side), x) for side in (height, width))
    maps = F.conv2d(F.conv2d(maps, down[None, None, :, None]), across[None, None, None, :])
    return maps.view(batch, channels, *maps.shape[2:])


def _gaussian(size: int, like: Tensor) -> Tensor:
    distance = torch.arange(size, dtype=like.dtype, device=like.device) - (size - 1) / 2
    weights = torch.exp(-distance.square() / (2 * SIGMA**2))
    return weights / weights.sum()
