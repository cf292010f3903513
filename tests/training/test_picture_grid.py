from __future__ import annotations

import pytest
import torch
from torchvision.utils import make_grid

from dalle_cli.training.picture_grid import RULE, picture_grid


@pytest.mark.parametrize(("count", "columns"), [(6, 3), (7, 3), (2, 8), (5, 1)])
def test_the_grid_is_torchvisions(count: int, columns: int) -> None:
    pictures = torch.randint(256, (count, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = make_grid(pictures.permute(0, 3, 1, 2), nrow=columns, padding=RULE, pad_value=255)
    assert picture_grid(pictures, columns).equal(expected)
