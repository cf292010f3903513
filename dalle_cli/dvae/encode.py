"""Encoding of images into tokens and decoding of tokens, and the image part of a token store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import Recipe
from dalle_cli.data.filters import picture_identity
from dalle_cli.data.joined import sizes_of
from dalle_cli.data.picture_loader import PictureBlock, consecutive_pictures
from dalle_cli.data.source import Source
from dalle_cli.data.workers import explain_lost_workers
from dalle_cli.distributed.device import choose_device, prepare_process, use_settings
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import encoder_input, reconstructed_images
from dalle_cli.dvae.train import load_dvae
from dalle_cli.progress import progress
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.shards import WHOLE, Shard
from dalle_cli.stores.token_writer import PartWriter

BLOCK = 64
"""Number of images read and encoded together; fixed, so that rounding, and thus the tokens, never varies."""
MAX_ACTIVATIONS = 2**27
"""Maximum number of values in the first group's output, which limits the images per pass (the paper's: 8, in 3 GB)."""


@torch.no_grad()
def encode_images(model: DVAE, images: Tensor, eps: float) -> Tensor:
    """Return the likeliest code at each position, (B, S / 8, S / 8) int64, for uint8 images (B, S, S, 3)."""
    _, height, width, _ = images.shape
    parts = images.split(images_per_pass(model, height, width))
    return torch.cat([model.encode_tokens(encoder_input(part, eps)) for part in parts])


@torch.no_grad()
def decode_tokens(model: DVAE, tokens: Tensor, eps: float) -> Tensor:
    """Return the likelihood's median for int64 tokens (B, h, w), as uint8 images (B, f h, f w, 3)."""
    _, rows, columns = tokens.shape
    side = model.settings.downsampling
    parts = tokens.split(images_per_pass(model, side * rows, side * columns))
    return torch.cat([reconstructed_images(model.decode_tokens(part)[0], eps) for part in parts])


def images_per_pass(model: DVAE, height: int, width: int) -> int:
    """Return the number of images of this size that are encoded or decoded together."""
    return max(1, MAX_ACTIVATIONS // (height * width * model.settings.n_hid))


def encode_blocks(model: DVAE, blocks: Iterable[PictureBlock], eps: float) -> Iterator[tuple[PictureBlock, np.ndarray]]:
    """Yield each block with its images' tokens, (n, views, grid, grid) uint16.

    A block is yielded once the next one is queued, so that a GPU stays busy while this process fetches and writes.
    """
    device = next(model.parameters()).device
    queued: tuple[PictureBlock, Tensor] | None = None
    for block in blocks:
        pictures = block.pictures.to(device, non_blocking=True)
        # One view after another, so that the first one's tokens do not depend on their number.
        tokens = torch.stack([encode_images(model, view, eps) for view in pictures.unbind(1)], dim=1)
        if queued is not None:
            yield queued[0], _as_stored(queued[1])
        queued = block, tokens
    if queued is not None:
        yield queued[0], _as_stored(queued[1])


def _as_stored(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy().astype(np.uint16)


@dataclass(frozen=True)
class EncodedRows:
    """Numbers of all ``rows`` encoded and of those ``skipped``, whose image could not be read or was filtered."""

    rows: int
    skipped: int


def encode_source(
    recipe: Recipe, source: Source, checkpoint: Checkpoint, out: Path, shard: Shard = WHOLE
) -> EncodedRows:
    """Write the image part of the store ``out``, or one share of it; resume at the last committed row.

    Raises:
        UserError: the store was made from another source or dVAE, another process is writing this share, or the disk is
            full.
    """
    trained_by = checkpoint.recipe()
    eps = trained_by.dvae.objective.logit_laplace_eps
    identity = {
        "source": source.identity,
        "source_name": source.name,
        **({"sizes": sizes} if len(sizes := sizes_of(source)) > 1 else {}),
        "dvae": checkpoint.identity,
        "grid": trained_by.grid,
        "codebook_size": trained_by.dvae.model.codebook_size,
        "filters": picture_identity(recipe.data.filters),
        "views": recipe.data.views,
        **({} if recipe.data.fit == "crop" else {"fit": recipe.data.fit}),
        **({"seed": recipe.seed} if recipe.data.views > 1 else {}),
    }
    with PartWriter(out, "image", identity, len(source), shard) as writer:
        if todo := writer.todo:
            use_settings(recipe)
            device = choose_device(recipe.device)
            prepare_process(device)
            model = load_dvae(checkpoint).to(device)
            blocks = consecutive_pictures(
                source,
                todo,
                block=BLOCK,
                image_size=trained_by.image_size,
                data=recipe.data,
                seed=recipe.seed,
                workers=recipe.dvae.training.workers,
                pinned=device.type == "cuda",
            )
            with explain_lost_workers():
                encode_into(writer, model, blocks, eps, len(todo))
        writer.finish()
    return EncodedRows(writer.rows, sum(writer.progress.skipped.values()))


def encode_into(writer: PartWriter, model: DVAE, blocks: Iterable[PictureBlock], eps: float, remaining: int) -> None:
    """Append the tokens of ``blocks``, with ``remaining`` samples in all, one whole shard of the store at a time."""
    keys: list[str] = []
    tokens: list[np.ndarray] = []
    reasons: dict[str, str] = {}
    with progress("encode-images", writer.rows + remaining, "images", writer.rows) as bar:
        for block, block_tokens in encode_blocks(model, blocks, eps):
            keys += block.keys
            tokens.append(block_tokens)
            reasons |= block.reasons
            remaining -= len(block.keys)
            if len(keys) == writer.rows_per_shard or remaining == 0:
                ok = np.array([key not in reasons for key in keys], dtype=np.uint8)
                image = np.concatenate(tokens) * ok[:, None, None, None]
                arrays = {"image": image[:, 0], "image_ok": ok}
                if image.shape[1] > 1:
                    arrays["image_views"] = image[:, 1:]
                writer.append(keys, arrays, reasons)
                keys, tokens, reasons = [], [], {}
            bar.advance(len(block.keys))
