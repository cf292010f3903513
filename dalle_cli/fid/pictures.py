"""Pictures to measure, as torch datasets of (3, H, W) uint8 tensors of one size, blurred or not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dalle_cli.data.images import BadImage, Fit, decode_image, eval_crop, read_header
from dalle_cli.data.open_source import is_manifest, open_source
from dalle_cli.data.sample_lines import read_sample_lines
from dalle_cli.data.sample_table import SampleTable
from dalle_cli.data.source import IMAGE_EXTENSIONS, BadSample, Source, read_image_file
from dalle_cli.errors import UserError

TRUNCATE = 4.0
"""Radius of the blur's kernel, in standard deviations."""


class Pictures(Dataset[Tensor]):
    """Pictures, made square as ``fit`` says and resized to ``image_size`` when read; a broken one raises UserError."""

    image_size: int
    fit: Fit = "crop"

    def __len__(self) -> int:
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """Return the content of the picture's file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the picture's name for error messages."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.picture(index).transpose(2, 0, 1)))

    def picture(self, index: int) -> NDArray[np.uint8]:
        """Return the cropped and resized picture, (image_size, image_size, 3)."""
        try:
            return eval_crop(decode_image(self.content(index)), self.image_size, self.fit)
        except BadImage as error:
            raise UserError(f"{self.name(index)}: {error}; remove or replace it") from error


NAMED = 20
"""Number of broken pictures that an error message names."""


def explain_broken(pictures: Dataset[Tensor]) -> str | None:
    """Return what is wrong with all broken ones of ``pictures``, on one line; None if every one can be read."""
    while isinstance(pictures, BlurredPictures):
        pictures = pictures.pictures
    if not isinstance(pictures, Pictures):
        return None
    broken = []
    for index in range(len(pictures)):
        try:
            pictures.picture(index)
        except UserError as error:
            broken.append(str(error))
    return _describe_broken(broken, len(pictures))


def _describe_broken(broken: list[str], total: int) -> str | None:
    if len(broken) < 2:
        return broken[0] if broken else None
    names = "; ".join(message.partition("; ")[0] for message in broken[:NAMED])
    more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{len(broken)} of {total} pictures cannot be used: {names}{more}; remove or replace them"


class FilePictures(Pictures):
    """Pictures in image files."""

    def __init__(self, paths: Sequence[Path], image_size: int, fit: Fit = "crop") -> None:
        self.paths = paths
        self.image_size, self.fit = image_size, fit

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        try:
            return read_image_file(self.paths[index])
        except BadSample as error:
            raise UserError(f"{self.paths[index]}: {error}; draw it again, or leave it out") from error


class SourcePictures(Pictures):
    """The pictures of a captioned source."""

    def __init__(self, source: Source, image_size: int, fit: Fit = "crop") -> None:
        self.source = source
        self.image_size, self.fit = image_size, fit

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return f"{self.source.name}: {self.source.key(index)}"

    def content(self, index: int) -> bytes:
        try:
            return self.source.image_bytes(index)
        except BadSample as error:
            raise UserError(f"{self.name(index)}: {error}; remove or replace it") from error


def named_by(pictures: FilePictures | SourcePictures, keys: Set[str], root: Path) -> NDArray[np.bool_]:
    """Return which of ``pictures`` the ``keys`` name, (n,).

    A source gives its samples' keys. A picture in a file goes by its path in the folder ``root``, with or without the
    extension; if no key is such a path, by any end of its path.
    """
    if isinstance(pictures, SourcePictures):
        return np.array([pictures.source.key(i) in keys for i in range(len(pictures))], bool)
    inside = [path.relative_to(root) if path.is_relative_to(root) else path for path in pictures.paths]
    found = np.array([path.as_posix() in keys or path.with_suffix("").as_posix() in keys for path in inside], bool)
    if found.any():
        return found
    return np.array([any(name in keys for name in _ends(path)) for path in pictures.paths], bool)


def _ends(path: Path) -> Iterator[str]:
    for end in range(len(path.parts)):
        yield "/".join(path.parts[end:])
        yield "/".join(path.with_suffix("").parts[end:])


class PictureSubset(Pictures):
    """Some rows of other pictures."""

    def __init__(self, pictures: Pictures, rows: Sequence[int] | NDArray[np.int64]) -> None:
        self.pictures, self.rows = pictures, np.asarray(rows, np.int64)
        self.image_size, self.fit = pictures.image_size, pictures.fit

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.pictures.name(int(self.rows[index]))

    def content(self, index: int) -> bytes:
        return self.pictures.content(int(self.rows[index]))


class BlurredPictures(Dataset[Tensor]):
    """Pictures blurred by a Gaussian after cropping and resizing."""

    def __init__(self, pictures: Pictures, radius: float) -> None:
        self.pictures, self.radius = pictures, radius

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return gaussian_blur(self.pictures[index], self.radius)


def gaussian_blur(pictures: Tensor, radius: float) -> Tensor:
    """Blur pictures (..., H, W) uint8 by a Gaussian and round them to uint8; radius 0 leaves them unchanged.

    ``radius`` is the standard deviation in pixels, as in Pillow's ``GaussianBlur``. The filter is that of
    ``scipy.ndimage.gaussian_filter(x, radius, mode="nearest")`` on each channel: cut at four standard deviations, with
    the border's pixels repeated. Two matrix products take about 0.6 of scipy's time.
    """
    if pictures.dtype != torch.uint8:
        raise TypeError(f"pictures are uint8, not {pictures.dtype}")
    if radius < 0:
        raise ValueError(f"a blur's radius is 0 or more, not {radius}")
    if radius == 0:
        return pictures
    height, width = pictures.shape[-2:]
    blurred = _blur_matrix(height, radius) @ pictures.float() @ _blur_matrix(width, radius).T
    return blurred.round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=16)
def _blur_matrix(side: int, radius: float) -> Tensor:
    """Return the blur along one axis as a matrix (side, side) whose rows sum to 1."""
    reach = int(TRUNCATE * radius + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / radius) ** 2)
    weights /= weights.sum()
    sources = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, sources, weights.expand(side, -1)).float()


@dataclass(frozen=True)
class Survey:
    """Hashes and sizes of pictures, read without decoding."""

    digests: list[str]
    """SHA-256 of each file."""
    sizes: NDArray[np.int64]
    """Width and height of each picture, (n, 2)."""


def survey(pictures: Pictures, advance: Callable[[], None] | None = None) -> Survey:
    """Read every picture's file and header once.

    Raises:
        UserError: a picture is missing or has no header of a known format.
    """
    digests: list[str] = []
    sizes = np.zeros((len(pictures), 2), np.int64)
    for index in range(len(pictures)):
        try:
            content = pictures.content(index)
            sizes[index] = read_header(content).size
        except (BadImage, UserError) as error:
            broken = explain_broken(pictures) or f"{pictures.name(index)}: {error}; remove or replace it"
            raise UserError(broken) from error
        digests.append(hashlib.sha256(content).hexdigest())
        if advance is not None:
            advance()
    return Survey(digests, sizes)


def open_pictures(spec: str, image_size: int, fit: Fit = "crop") -> FilePictures | SourcePictures:
    """Open a folder of pictures, lines of samples, or a captioned source such as tars or COCO's captions.

    A folder's pictures are read at any depth, in the order of their paths. A .jsonl file holds lines of ``dalle
    sample`` or ``dalle rerank``, unless it is a source's manifest.

    Raises:
        UserError: ``spec`` is none of these.
    """
    folder = Path(spec)
    if folder.suffix == ".jsonl" and folder.is_file() and not is_manifest(folder):
        with folder.open(encoding="utf-8") as lines:
            table = SampleTable(read_sample_lines(lines, spec))
        return FilePictures(table.paths(np.arange(len(table))), image_size, fit)
    if folder.is_dir():
        paths = sorted(
            path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file()
        )
        if paths:
            return FilePictures(paths, image_size, fit)
    return SourcePictures(open_source(spec), image_size, fit)
