"""A grid of pictures in one image, for the examples that a run shows at its validations."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RULE = 2
"""Width in pixels of the white rules around the pictures."""


def picture_grid(pictures: Tensor, columns: int) -> Tensor:
    """Lay pictures (n, H, W, 3) uint8 out in rows of ``columns``, as one image (3, height, width) uint8."""
    # torchvision's make_grid does the same, but importing torchvision takes as long as importing torch.
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (3, rows * (height + RULE) + RULE, columns * (width + RULE) + RULE)
    grid = torch.full(size, 255, dtype=torch.uint8, device=pictures.device)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top, left = RULE + row * (height + RULE), RULE + column * (width + RULE)
        grid[:, top : top + height, left : left + width] = picture.permute(2, 0, 1)
    return grid
