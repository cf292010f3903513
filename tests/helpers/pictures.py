"""Small pictures and samples on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0, spread: float = 60) -> Image.Image:
    """Return a picture of smooth noise; ``spread`` is the standard deviation of its coarse grid of values."""
    values = np.random.default_rng(seed).normal(128, spread, (max(2, height // 16), max(2, width // 16), 3))
    small = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_sample(folder: Path, key: str, image: Image.Image, *captions: str) -> None:
    """Write KEY.png and its captions in KEY.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{key}.png")
    (folder / f"{key}.txt").write_text("\n".join(captions))
