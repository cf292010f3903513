"""Pictures to be measured, as torch datasets of (3, H, W) uint8 tensors of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dalle_cli.clip.rerank import read_manifest
from dalle_cli.data.images import MAX_PIXELS, BadImage, decode_image, eval_crop, read_header
from dalle_cli.data.open_source import is_manifest, open_source
from dalle_cli.data.source import BadSample, Source
from dalle_cli.errors import UserError

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


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class Pictures(Dataset[Tensor]):
    """Encoded pictures, centre-cropped and resized to ``image_size``. Reading a broken one raises UserError."""

    image_size: int
    max_pixels: int

    def __len__(self) -> int:
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The picture as it is stored; UserError where it cannot be read."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What the picture is called in a message."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        return _channels_first(self.picture(index))

    def picture(self, index: int) -> NDArray[np.uint8]:
        """Cut to size, (image_size, image_size, 3)."""
        try:
            return eval_crop(decode_image(self.content(index), self.max_pixels), self.image_size)
        except BadImage as error:
            raise UserError(f"{self.name(index)}: {error}; remove or replace it") from error


class FilePictures(Pictures):
    """Picture files."""

    def __init__(self, paths: Sequence[Path], image_size: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self.paths = list(paths)
        self.image_size = image_size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        path = self.paths[index]
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: the picture is missing; draw it again, or leave its line out") from None
        except OSError as error:
            raise UserError(f"{path}: {error}; remove or replace it") from error


class SourcePictures(Pictures):
    """A captioned source's pictures."""

    def __init__(self, source: Source, image_size: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self.source = source
        self.image_size = image_size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return f"{self.source.name}: {self.source.key(index)}"

    def content(self, index: int) -> bytes:
        try:
            return self.source.image_bytes(index)
        except BadSample as error:
            raise UserError(f"{self.name(index)}: {error}; remove or replace it") from error


class SomePictures(Pictures):
    """Some rows of others."""

    def __init__(self, pictures: Pictures, rows: Sequence[int]) -> None:
        self.pictures, self.rows = pictures, list(rows)
        self.image_size, self.max_pixels = pictures.image_size, pictures.max_pixels

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.pictures.name(self.rows[index])

    def content(self, index: int) -> bytes:
        return self.pictures.content(self.rows[index])


class Blurred(Dataset[Tensor]):
    """Pictures under a Gaussian blur, after they were cut to size."""

    def __init__(self, pictures: Dataset[Tensor], radius: float) -> None:
        self.pictures, self.radius = pictures, radius

    def __len__(self) -> int:
        return len(self.pictures)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        return gaussian_blur(self.pictures[index], self.radius)


@dataclass(frozen=True)
class Survey:
    """What can be told of pictures without decoding them: sha256 of each file, and sizes (n, 2) as width, height."""

    digests: list[str]
    sizes: NDArray[np.int64]


def survey(pictures: Pictures, advance: Callable[[], None] | None = None) -> Survey:
    """Look at every picture once. Raises UserError where one is missing or has no header of a picture."""
    digests: list[str] = []
    sizes = np.zeros((len(pictures), 2), np.int64)
    for index in range(len(pictures)):
        content = pictures.content(index)
        digests.append(hashlib.sha256(content).hexdigest())
        try:
            sizes[index] = read_header(content).size
        except BadImage as error:
            raise UserError(f"{pictures.name(index)}: {error}; remove or replace it") from error
        if advance is not None:
            advance()
    return Survey(digests, sizes)


def open_pictures(spec: str, image_size: int, *, max_pixels: int = MAX_PIXELS) -> FilePictures | SourcePictures:
    """The pictures of a folder (at any depth, in the order of their paths), of a file of ``dalle sample``'s or
    ``dalle rerank``'s lines (.jsonl), or else of a source, such as tars, a manifest or COCO's captions.

    Raises UserError where there is nothing of the kind.
    """
    folder = Path(spec)
    if folder.suffix == ".jsonl" and folder.is_file() and not is_manifest(folder):
        with folder.open(encoding="utf-8") as lines:
            return FilePictures([Path(line["png"]) for line in read_manifest(lines, spec)], image_size)
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if paths:
            return FilePictures(paths, image_size, max_pixels=max_pixels)
    return SourcePictures(open_source(spec), image_size, max_pixels=max_pixels)


def _channels_first(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
