"""Pictures of photograph-like noise and of shapes, and altered copies of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from dalle_cli.data.overlap.hashes import Thumbnails, thumbnail
from dalle_cli.shapes.drawing import render
from dalle_cli.shapes.scene import random_scene


@cache
def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Return noise with the spectrum of photographs (amplitude falls as 1 / frequency) and an edge."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width) * width, np.fft.fftfreq(height) * height))
    frequency[0, 0] = 1
    common = rng.standard_normal((height, width))
    channels = []
    for _ in range(3):
        white = common + 0.5 * rng.standard_normal((height, width))
        field = np.fft.ifft2(np.fft.fft2(white) / frequency**1.2).real
        channels.append(128 + 45 * (field - field.mean()) / field.std())
    pixels = np.stack(channels, axis=-1)
    left, top = rng.integers(0, width // 2), rng.integers(0, height // 2)
    pixels[top : top + height // 3, left : left + width // 3] += rng.normal(0, 40, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def drawing(seed: int) -> Image.Image:
    """Return a large scene of the shapes world, with flat colours and much symmetry."""
    return Image.fromarray(render(random_scene(0, "train", seed), 192))


def jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    """Encode the picture as JPEG and decode it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    """Shrink the picture to half its side."""
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut shares of the picture off its sides."""
    w, h = image.size
    return image.crop((round(left * w), round(top * h), round((1 - right) * w), round((1 - bottom) * h)))


def one_side(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut 2 to 5 % off a random side."""
    cuts = [0.0] * 4
    cuts[rng.integers(4)] = rng.uniform(0.02, 0.05)
    return cropped(image, *cuts)


def all_sides(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut 2 to 5 % off each side."""
    return cropped(image, *rng.uniform(0.02, 0.05, 4))


ALTERATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "jpeg 50": lambda image, _: jpeg(image),
    "half": lambda image, _: half(image),
    "one side": one_side,
    "all sides": all_sides,
    "all sides, half, jpeg 50": lambda image, rng: jpeg(half(all_sides(image, rng))),
}


def thumbnails(images: list[Image.Image]) -> Thumbnails:
    """Return the thumbnails of some pictures, (n, SIDE, SIDE, 3) uint8."""
    return np.stack([thumbnail(image) for image in images])
