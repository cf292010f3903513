"""Pictures to be measured, as torch datasets of (3, H, W) uint8 tensors of one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dalle_cli.clip.rerank import read_manifest
from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.sources import BadSample, Source, open_source
from dalle_cli.errors import UserError

MAX_PIXELS = 100_000_000
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


class ArrayPictures(Dataset[Tensor]):
    """Pictures in memory: (n, H, W, 3) uint8."""

    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise TypeError(f"pictures are (n, H, W, 3) uint8, not {pictures.shape} {pictures.dtype}")
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return _channels_first(self.pictures[index])


class FilePictures(Dataset[Tensor]):
    """Picture files, centre-cropped and resized to ``image_size``. Reading a broken one raises UserError."""

    def __init__(self, paths: Sequence[Path], image_size: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self.paths = list(paths)
        self.image_size = image_size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            return _channels_first(eval_crop(decode_image(path.read_bytes(), self.max_pixels), self.image_size))
        except (OSError, BadImage) as error:
            raise UserError(f"{path}: {error}; remove or replace it") from error


class SourcePictures(Dataset[Tensor]):
    """A captioned source's pictures, centre-cropped and resized; reading a broken one raises UserError."""

    def __init__(self, source: Source, image_size: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self.source = source
        self.image_size = image_size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return _channels_first(
                eval_crop(decode_image(self.source.image_bytes(index), self.max_pixels), self.image_size)
            )
        except (BadSample, BadImage) as error:
            raise UserError(f"{self.source.name}: {self.source.key(index)}: {error}; remove or replace it") from error


def open_pictures(spec: str, image_size: int, *, max_pixels: int = MAX_PIXELS) -> FilePictures | SourcePictures:
    """The pictures of a folder (at any depth, in the order of their paths), of a file of ``dalle sample``'s or
    ``dalle rerank``'s lines (.jsonl), or else of a source, such as tars.

    Raises UserError where there is nothing of the kind.
    """
    folder = Path(spec)
    if folder.suffix == ".jsonl" and folder.is_file():
        with folder.open(encoding="utf-8") as lines:
            return FilePictures([Path(line["png"]) for line in read_manifest(lines, spec)], image_size)
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if paths:
            return FilePictures(paths, image_size, max_pixels=max_pixels)
    return SourcePictures(open_source(spec), image_size, max_pixels=max_pixels)


def _channels_first(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
