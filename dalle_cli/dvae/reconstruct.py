"""Images beside their reconstructions from tokens, with metrics of the difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import IMAGE_EXTENSIONS, BadSample, read_image_file, split_extension
from dalle_cli.distributed.device import choose_device, prepare_process, use_settings
from dalle_cli.dvae.encode import decode_tokens, encode_images
from dalle_cli.dvae.objective import MIN_MSE
from dalle_cli.dvae.ssim import ssim
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.progress import log, progress
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.files import plain_name, write_atomically
from dalle_cli.stores.png import encode_png

GAP = 8
"""Number of white pixel columns between an original and its reconstruction."""


@dataclass(frozen=True)
class ImageFile:
    """An image that has not been read yet."""

    key: str
    read: Callable[[], bytes]
    """Returns the file's bytes or raises BadSample."""
    captions: Callable[[], Sequence[str]] | None = None
    """Returns the source's captions or raises BadSample."""


@dataclass(frozen=True)
class Reconstruction:
    """A reconstruction's file and metrics, computed on the pixels as written."""

    key: str
    psnr: float
    """Decibels."""
    ssim: float
    mse: float
    """Mean squared error on the scale 0..1."""
    png: str


def list_images(specs: Sequence[str]) -> list[ImageFile]:
    """Return the images of ``specs`` in order; a path with an image's extension is one image, all others are sources.

    Raises:
        UserError: a source cannot be opened, or holds no images.
    """
    images: list[ImageFile] = []
    for spec in specs:
        path = Path(spec)
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not path.is_dir():
            images.append(ImageFile(spec, partial(read_image_file, path)))
            continue
        source = open_source(spec)
        log(source.describe())
        images += [
            ImageFile(source.key(row), partial(source.image_bytes, row), partial(source.captions, row))
            for row in range(len(source))
        ]
    return images


def reconstruct_images(
    checkpoint: Checkpoint, images: Sequence[ImageFile], out: Path, size: int | None = None, *, alone: bool = False
) -> Iterator[Reconstruction]:
    """Write each image's reconstruction to ``out/00000-KEY.png`` and so on, and yield its metrics.

    Images are cropped to ``size`` (by default the dVAE's) as for evaluation. Each is encoded alone, so that its metrics
    do not depend on the others. Unreadable images are skipped, with the reason on stderr. ``alone`` leaves out the
    original to the left, and writes the captions that a source has to a .txt file beside the PNG.

    Raises:
        UserError: none of the images could be read, ``out`` cannot be written, or ``size`` is not a multiple of the
            dVAE's downsampling.
    """
    recipe = checkpoint.recipe()
    size = recipe.image_size if size is None else size
    if size % (side := recipe.dvae.model.downsampling):
        raise UserError(f"--size {size} is not a multiple of {side}; choose one, such as {recipe.image_size}")
    use_settings(recipe)
    device = choose_device()
    prepare_process(device)
    model, eps = load_dvae(checkpoint).to(device), recipe.dvae.objective.logit_laplace_eps
    skipped: dict[str, str] = {}
    with progress("reconstruct", len(images), "images") as bar:
        for number, image in enumerate(images):
            try:
                original = eval_crop(decode_image(image.read(), recipe.data.max_pixels), size, recipe.data.fit)
            except (BadSample, BadImage) as error:
                skipped[image.key] = str(error)
                bar.say(f"skipped {image.key}: {error}")
            else:
                pixels = torch.from_numpy(original.copy())[None].to(device)
                rebuilt = decode_tokens(model, encode_images(model, pixels, eps), eps)[0].cpu().numpy()
                png = out / f"{number:05d}-{_file_name(image.key)}.png"
                shown = rebuilt if alone else np.concatenate(_side_by_side(original, rebuilt), axis=1)
                write_atomically(png, encode_png(shown))
                if alone and image.captions is not None:
                    with suppress(BadSample):  # it has no captions
                        write_atomically(png.with_suffix(".txt"), "\n".join(image.captions()) + "\n")
                yield _measured(image.key, original, rebuilt, png)
            bar.advance()
    if len(skipped) == len(images):
        key, reason = next(iter(skipped.items()))
        raise UserError(f"none of the {len(images)} images can be read ({key}: {reason}); name files that can")
    if skipped:
        log(f"{len(skipped)} of {len(images)} images skipped")


def mean_metrics(reconstructions: Sequence[Reconstruction]) -> dict[str, float]:
    """Return the mean of each metric over the images."""
    return {name: float(np.mean([getattr(r, name) for r in reconstructions])) for name in ("psnr", "ssim", "mse")}


def _measured(key: str, original: NDArray[np.uint8], rebuilt: NDArray[np.uint8], png: Path) -> Reconstruction:
    a, b = (torch.from_numpy(pixels / 255).permute(2, 0, 1)[None] for pixels in (original, rebuilt))
    mse = float((a - b).square().mean())
    psnr = -10 * math.log10(max(mse, MIN_MSE))
    return Reconstruction(key, round(psnr, 4), round(float(ssim(a, b)), 6), round(mse, 8), str(png))


def _side_by_side(original: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [original, np.full((len(original), GAP, 3), 255, np.uint8), rebuilt]


def _file_name(key: str) -> str:
    """Return ``key`` without folders and characters that need quoting; the number before it makes it unique."""
    stem, extension = split_extension(key.rpartition("/")[2])
    name = stem if extension in IMAGE_EXTENSIONS else f"{stem}.{extension}".rstrip(".")
    return plain_name(name)[-80:]
