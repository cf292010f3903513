"""Pictures to image tokens, into a token store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_cli.data.sources import Source
from dalle_cli.dvae.likelihood import phi, reconstruct
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import load_dvae
from dalle_cli.progress import progress
from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.tokens import ROWS_PER_SHARD, PartWriter
from dalle_cli.training.loop import limit_threads
from dalle_cli.training.pictures import consecutive_pictures

BLOCK = 64
"""Pictures encoded at once. Fixed, so that rounding, and with it the tokens, depends on nothing else."""


@torch.no_grad()
def encode_pictures(model: DVAE, pictures: Tensor, eps: float) -> Tensor:
    """(B, S, S, 3) uint8 -> tokens (B, S / 8, S / 8) int64, the likeliest code at each place."""
    return model.encode_tokens(phi(pictures.permute(0, 3, 1, 2), eps))


@torch.no_grad()
def decode_pictures(model: DVAE, tokens: Tensor, eps: float) -> Tensor:
    """Tokens (B, h, w) int64 -> pictures (B, 8 h, 8 w, 3) uint8: the likelihood's median, phi^-1(sigmoid(mu))."""
    mu, _ = model.decode_tokens(tokens)
    return reconstruct(mu, eps).round().to(torch.uint8).permute(0, 2, 3, 1)


def encode_source(recipe: Recipe, source: Source, checkpoint: Checkpoint, out: Path) -> dict[str, int]:
    """Write the image part of the store ``out``; goes on at the last committed row. Returns rows and skipped rows.

    Raises:
        UserError: the store was made from another source or dVAE, or the disk is full.
    """
    made_by = checkpoint.recipe()
    eps = made_by.dvae.objective.logit_laplace_eps
    identity = {
        "source": source.name,
        "dvae": checkpoint.identity,
        "grid": made_by.grid,
        "codebook_size": made_by.dvae.model.codebook_size,
    }
    writer = PartWriter(out, "image", identity)
    writer.check_source(len(source))
    if not writer.complete:
        limit_threads(recipe)
        model = load_dvae(checkpoint)
        blocks = consecutive_pictures(
            source,
            writer.rows,
            block=BLOCK,
            image_size=made_by.image_size,
            data=recipe.data,
            workers=recipe.dvae.training.workers,
        )
        keys: list[str] = []
        tokens: list[np.ndarray] = []
        reasons: dict[str, str] = {}
        with progress("encode-images", len(source), "images", writer.rows) as bar:
            for block in blocks:
                keys += block.keys
                tokens.append(encode_pictures(model, block.pictures, eps).numpy().astype(np.uint16))
                reasons |= block.reasons
                if len(keys) == ROWS_PER_SHARD or writer.rows + len(keys) == len(source):
                    ok = np.array([key not in reasons for key in keys], dtype=np.uint8)
                    image = np.concatenate(tokens) * ok[:, None, None]
                    writer.append(keys, {"image": image, "image_ok": ok}, reasons)
                    keys, tokens, reasons = [], [], {}
                bar.advance(len(block.keys))
        writer.finish()
    return {"rows": writer.rows, "skipped": sum(writer.state["skipped"].values())}
