"""Colours of the plots are told apart by readers of every kind of colour blindness."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from dalle_cli.views.plots import SERIES

# Machado, Oliveira and Fernandes 2009, for a complete lack of the cones of one kind, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])
DIFFERENT = 15
"""Distance in CIELAB; about 2 can be seen at all."""


def lab(colour: str, seen_by: object) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    share = XYZ @ np.clip(np.asarray(seen_by) @ linear, 0, 1) / WHITE
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_series_have_colours_that_everybody_tells_apart(kind: str) -> None:
    seen = {colour: lab(colour, BLINDNESS[kind]) for colour in SERIES}
    for one, other in combinations(SERIES, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > DIFFERENT, (one, other)
