"""SSIM against the paper's formulas written place by place, and against scipy's filters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from dalle_cli.dvae.ssim import ssim
from dalle_cli.randomness import numpy_generator


def naive(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, section III.B, of two grey pictures of range 255: sums over each 11 x 11 window in turn."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    window = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-5, 6)] for i in range(-5, 6)])
    window /= window.sum()
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            spread_x, spread_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            together = (window * (x - mean_x) * (y - mean_y)).sum()
            values.append(
                (2 * mean_x * mean_y + c1) * (2 * together + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2))
            )  # fmt: skip
    return float(np.mean(values))


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The same with scipy's Gaussian filter, cut at 5 pixels, the border of half a window left out."""

    def blur(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    mean_a, mean_b = blur(a), blur(b)
    cov = blur(a * b) - mean_a * mean_b
    spread = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    c1, c2 = 6.5025, 58.5225
    return float(np.mean((2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))))


def pair(kind: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures (3, H, W) of 0..255 that are alike in some way."""
    rng = numpy_generator(0, "ssim", kind)
    a = ndimage.gaussian_filter(rng.uniform(0, 255, (3, height, width)), (0, 2, 2)) * 3 - 255
    a = np.clip(a, 0, 255)
    b = {
        "noisy": np.clip(a + rng.normal(0, 25, a.shape), 0, 255),
        "blurred": ndimage.gaussian_filter(a, (0, 1.5, 1.5)),
        "darker": 0.6 * a,
        "negative": 255 - a,
        "another": rng.uniform(0, 255, a.shape),
    }[kind]
    return a, b


@pytest.mark.parametrize("kind", ["noisy", "blurred", "darker", "negative", "another"])
def test_ssim_is_the_papers(kind: str) -> None:
    a, b = pair(kind, 24, 19)
    found = float(ssim(*(torch.from_numpy(x / 255).float()[None] for x in (a, b))))
    assert found == pytest.approx(np.mean([naive(x, y) for x, y in zip(a, b, strict=True)]), abs=2e-5)
    assert found == pytest.approx(np.mean([by_scipy(x, y) for x, y in zip(a, b, strict=True)]), abs=2e-5)


def test_pictures_of_a_batch_are_apart_and_equal_ones_have_one() -> None:
    pictures = [torch.from_numpy(x / 255).float() for kind in ("noisy", "negative") for x in pair(kind, 16, 32)]
    a, b = torch.stack(pictures[::2]), torch.stack(pictures[1::2])
    found = ssim(a, b)
    assert found.shape == (2,)
    torch.testing.assert_close(found, torch.cat([ssim(a[:1], b[:1]), ssim(a[1:], b[1:])]))
    torch.testing.assert_close(ssim(b, a), found)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert float(ssim(black, white)) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-3)


def test_a_picture_smaller_than_the_window_is_one_window() -> None:
    a, b = (torch.from_numpy(x[:, :8, :8] / 255).double()[None] for x in pair("noisy", 16, 16))
    at = np.arange(8) - 3.5
    window = np.exp(-(at[:, None] ** 2 + at**2) / 4.5)
    weights = torch.from_numpy(window / window.sum())
    values = []
    for x, y in zip(a[0], b[0], strict=True):
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        cov = (weights * (x - mean_x) * (y - mean_y)).sum()
        spread = (weights * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum()
        luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
        values.append(luminance * (2 * cov + 9e-4) / (spread + 9e-4))
    assert float(ssim(a, b)) == pytest.approx(float(torch.stack(values).mean()), rel=1e-9)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        ssim(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 24))
