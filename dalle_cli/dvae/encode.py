"""Pictures to image tokens, into a token store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import DOWNSAMPLING, Recipe
from dalle_cli.data.filters import picture_identity
from dalle_cli.data.picture_loader import PictureBlock, consecutive_pictures
from dalle_cli.data.source import Source
from dalle_cli.distributed.device import choose_device, limit_threads, prepare_process
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import phi, reconstruct
from dalle_cli.dvae.train import load_dvae
from dalle_cli.progress import progress
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.shards import WHOLE, Shard
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import ROWS_PER_SHARD

BLOCK = 64
"""Pictures read and encoded together. Fixed, so that rounding, and with it the tokens, depends on nothing else."""
MOST_ACTIVATIONS = 2**27
"""Values of the first group's output held at once: fewer pictures than BLOCK where they are large (8 of the paper's,
which then take 3 GB)."""


@torch.no_grad()
def encode_pictures(model: DVAE, pictures: Tensor, eps: float) -> Tensor:
    """(B, S, S, 3) uint8 -> tokens (B, S / 8, S / 8) int64, the likeliest code at each place."""
    _, height, width, _ = pictures.shape
    together = pictures_at_once(model, height, width)
    return torch.cat([model.encode_tokens(phi(part.permute(0, 3, 1, 2), eps)) for part in pictures.split(together)])


@torch.no_grad()
def decode_pictures(model: DVAE, tokens: Tensor, eps: float) -> Tensor:
    """Tokens (B, h, w) int64 -> pictures (B, 8 h, 8 w, 3) uint8: the likelihood's median, phi^-1(sigmoid(mu))."""
    _, rows, columns = tokens.shape
    parts = tokens.split(pictures_at_once(model, DOWNSAMPLING * rows, DOWNSAMPLING * columns))
    pictures = [reconstruct(model.decode_tokens(part)[0], eps).round().to(torch.uint8) for part in parts]
    return torch.cat(pictures).permute(0, 2, 3, 1)


def pictures_at_once(model: DVAE, height: int, width: int) -> int:
    """How many pictures of this size are encoded or decoded together."""
    return max(1, MOST_ACTIVATIONS // (height * width * model.settings.n_hid))


def encode_blocks(model: DVAE, blocks: Iterable[PictureBlock], eps: float) -> Iterator[tuple[PictureBlock, np.ndarray]]:
    """Each block with its pictures' tokens, (n, S / 8, S / 8) uint16.

    A block is handed out when the next one is queued, so that a GPU goes on while this process fetches and writes.
    """
    device = next(model.parameters()).device
    queued: tuple[PictureBlock, Tensor] | None = None
    for block in blocks:
        tokens = encode_pictures(model, block.pictures.to(device, non_blocking=True), eps)
        if queued is not None:
            yield queued[0], _as_stored(queued[1])
        queued = block, tokens
    if queued is not None:
        yield queued[0], _as_stored(queued[1])


def _as_stored(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy().astype(np.uint16)


def encode_source(
    recipe: Recipe, source: Source, checkpoint: Checkpoint, out: Path, shard: Shard = WHOLE
) -> dict[str, int]:
    """Write the image part of the store ``out``, or one share of it; resume at the last committed row.

    Returns:
        The numbers of rows and of skipped rows.

    Raises:
        UserError: the store was made from another source or dVAE, another process is writing this share, or the disk is
            full.
    """
    made_by = checkpoint.recipe()
    eps = made_by.dvae.objective.logit_laplace_eps
    identity = {
        "source": source.name,
        "dvae": checkpoint.identity,
        "grid": made_by.grid,
        "codebook_size": made_by.dvae.model.codebook_size,
        "filters": picture_identity(recipe.data.filters),
    }
    with PartWriter(out, "image", identity, len(source), shard) as writer:
        if todo := writer.todo:
            limit_threads(recipe)
            device = choose_device()
            prepare_process(device)
            model = load_dvae(checkpoint).to(device)
            blocks = consecutive_pictures(
                source,
                todo,
                block=BLOCK,
                image_size=made_by.image_size,
                data=recipe.data,
                workers=recipe.dvae.training.workers,
                pinned=device.type == "cuda",
            )
            encode_into(writer, model, blocks, eps, len(todo))
        writer.finish()
    return {"rows": writer.rows, "skipped": sum(writer.progress.skipped.values())}


def encode_into(writer: PartWriter, model: DVAE, blocks: Iterable[PictureBlock], eps: float, left: int) -> None:
    """Append the tokens of ``blocks``, which hold ``left`` samples, by whole shards."""
    keys: list[str] = []
    tokens: list[np.ndarray] = []
    reasons: dict[str, str] = {}
    with progress("encode-images", writer.rows + left, "images", writer.rows) as bar:
        for block, found in encode_blocks(model, blocks, eps):
            keys += block.keys
            tokens.append(found)
            reasons |= block.reasons
            left -= len(block.keys)
            if len(keys) == ROWS_PER_SHARD or left == 0:
                ok = np.array([key not in reasons for key in keys], dtype=np.uint8)
                image = np.concatenate(tokens) * ok[:, None, None]
                writer.append(keys, {"image": image, "image_ok": ok}, reasons)
                keys, tokens, reasons = [], [], {}
            bar.advance(len(block.keys))
