"""The blur of eval-fid against scipy's Gaussian filter and Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image, ImageFilter

from dalle_cli.fid.pictures import gaussian_blur


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("radius", [0.5, 1, 2, 4, 8, 20])
def test_it_is_scipys_gaussian_filter_rounded(radius: float) -> None:
    x = picture(40, 56)
    expected = np.stack([scipy.ndimage.gaussian_filter(c.astype(float), radius, mode="nearest") for c in x])
    blurred = gaussian_blur(torch.from_numpy(x), radius)
    assert blurred.dtype == torch.uint8
    # Half a level is what rounding may take.
    assert np.abs(blurred.numpy() - expected).max() <= 0.501
    batch = gaussian_blur(torch.from_numpy(np.stack([x, x[::-1].copy()])), radius)
    assert torch.equal(batch[0], blurred)
    assert torch.equal(batch[1].flip(0), blurred)


def test_its_radius_is_pillows() -> None:
    """Pillow approximates the same filter by three boxes: alike inside, where the radius would show at once."""
    x = picture(96, 96)
    for radius in (2, 4, 8):
        image = Image.fromarray(x.transpose(1, 2, 0))
        pillow = np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).transpose(2, 0, 1).astype(float)
        difference = np.abs(gaussian_blur(torch.from_numpy(x), radius).numpy() - pillow)
        other = np.abs(gaussian_blur(torch.from_numpy(x), 1.25 * radius).numpy() - pillow)
        assert difference.mean() < 1
        assert difference.mean() < 0.6 * other.mean()


def test_nothing_is_blurred_at_0_and_mistakes_are_refused() -> None:
    x = torch.from_numpy(picture(9, 7))
    assert torch.equal(gaussian_blur(x, 0), x)
    one_colour = torch.full((3, 5, 6), 77, dtype=torch.uint8)
    assert torch.equal(gaussian_blur(one_colour, 8), one_colour)
    with pytest.raises(ValueError, match="radius"):
        gaussian_blur(x, -1)
    with pytest.raises(TypeError):
        gaussian_blur(x.float(), 1)
