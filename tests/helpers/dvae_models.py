"""A small dVAE and images for it."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_cli.config.schema import DvaeModel
from dalle_cli.randomness import torch_generator

SMALL = DvaeModel(n_hid=8, n_init=6, blocks_per_group=1, codebook_size=16)


EPS = 0.1


def pictures(n: int, side: int = 16) -> Tensor:
    """Return (n, side, side, 3) uint8 noise."""
    generator = torch_generator(0, "pictures")
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8).permute(0, 2, 3, 1)
