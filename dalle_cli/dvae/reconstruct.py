"""Pictures beside their reconstructions from image tokens, with the figures of how far they differ."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.config.schema import DOWNSAMPLING
from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import IMAGE_EXTENSIONS, BadSample, read_image_file, split_extension
from dalle_cli.distributed.device import choose_device, limit_threads, prepare_process
from dalle_cli.dvae.encode import decode_pictures, encode_pictures
from dalle_cli.dvae.objective import LEAST_MSE
from dalle_cli.dvae.ssim import ssim
from dalle_cli.dvae.train import load_dvae
from dalle_cli.errors import UserError
from dalle_cli.progress import log, progress
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.files import write_atomically

GAP = 8
"""White pixels between the two pictures."""
FIGURES = ("psnr", "ssim", "mse")


@dataclass(frozen=True)
class Picture:
    """A picture by name, not read yet."""

    key: str
    read: Callable[[], bytes]
    """Its file's bytes. Raises BadSample."""
    captions: Callable[[], Sequence[str]] | None = None
    """A source's captions of it. Raises BadSample."""


def list_pictures(specs: Sequence[str]) -> list[Picture]:
    """What ``specs`` name, in their order: a path that ends as pictures do is one, anything else is a source.

    Raises:
        UserError: a source is none, or holds no pictures.
    """
    pictures: list[Picture] = []
    for spec in specs:
        path = Path(spec)
        if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and not path.is_dir():
            pictures.append(Picture(spec, partial(read_image_file, path)))
            continue
        source = open_source(spec)
        log(source.describe())
        pictures += [
            Picture(source.key(row), partial(source.image_bytes, row), partial(source.captions, row))
            for row in range(len(source))
        ]
    return pictures


def reconstruct_pictures(
    checkpoint: Checkpoint, pictures: Sequence[Picture], out: Path, size: int | None = None, *, alone: bool = False
) -> Iterator[dict[str, Any]]:
    """Write ``out/00000-KEY.png`` and so on, original left and reconstruction right, or with ``alone`` only the latter,
    with its captions in a .txt file beside it where a source has them; yield each picture's figures.

    Pictures are cut as for evaluation to ``size``, by default the dVAE's own. Each is encoded alone, so that its
    figures do not depend on its company. They are of the pixels as written: ``mse`` and ``ssim`` on the scale 0..1,
    ``psnr`` in dB. One that cannot be read is said on stderr, with its reason, and passed over.

    Raises:
        UserError: none of them could be read, ``size`` is no multiple of 8, or ``out`` may not be written.
    """
    recipe = checkpoint.recipe()
    size = recipe.image_size if size is None else size
    if size % DOWNSAMPLING:
        raise UserError(f"--size {size} is no multiple of {DOWNSAMPLING}; choose one, such as {recipe.image_size}")
    limit_threads(recipe)
    device = choose_device()
    prepare_process(device)
    model, eps = load_dvae(checkpoint).to(device), recipe.dvae.objective.logit_laplace_eps
    skipped: dict[str, str] = {}
    with progress("reconstruct", len(pictures), "pictures") as bar:
        for number, picture in enumerate(pictures):
            try:
                original = eval_crop(decode_image(picture.read(), recipe.data.max_pixels), size)
            except (BadSample, BadImage) as error:
                skipped[picture.key] = str(error)
                bar.say(f"skipped {picture.key}: {error}")
            else:
                pixels = torch.from_numpy(original.copy())[None].to(device)
                rebuilt = decode_pictures(model, encode_pictures(model, pixels, eps), eps)[0].cpu().numpy()
                png = out / f"{number:05d}-{_file_name(picture.key)}.png"
                write_atomically(png, _png([rebuilt] if alone else _side_by_side(original, rebuilt)))
                if alone and picture.captions is not None:
                    with suppress(BadSample):  # it has none
                        write_atomically(png.with_suffix(".txt"), "\n".join(picture.captions()) + "\n")
                yield {"key": picture.key, **_figures(original, rebuilt), "png": str(png)}
            bar.advance()
    if len(skipped) == len(pictures):
        key, reason = next(iter(skipped.items()))
        raise UserError(f"none of the {len(pictures)} pictures can be read ({key}: {reason}); name whole pictures")
    if skipped:
        log(f"{len(skipped)} of {len(pictures)} pictures skipped")


def mean_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each figure over the pictures."""
    return {name: float(np.mean([row[name] for row in rows])) for name in FIGURES}


def _figures(original: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> dict[str, float]:
    a, b = (torch.from_numpy(picture / 255).permute(2, 0, 1)[None] for picture in (original, rebuilt))
    mse = float((a - b).square().mean())
    psnr = -10 * math.log10(max(mse, LEAST_MSE))
    return {"psnr": round(psnr, 4), "ssim": round(float(ssim(a, b)), 6), "mse": round(mse, 8)}


def _side_by_side(original: NDArray[np.uint8], rebuilt: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    return [original, np.full((len(original), GAP, 3), 255, np.uint8), rebuilt]


def _png(columns: Sequence[NDArray[np.uint8]]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.concatenate(columns, axis=1)).save(file, "PNG")
    return file.getvalue()


def _file_name(key: str) -> str:
    """``key`` without what a file's name cannot hold, or a shell would have to quote; the number makes it unique."""
    stem, extension = split_extension(key.rpartition("/")[2])
    name = stem if extension in IMAGE_EXTENSIONS else f"{stem}.{extension}".rstrip(".")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[-80:]
