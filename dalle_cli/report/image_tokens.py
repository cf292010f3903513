"""Check a run's image tokens: reconstructions, and the use of the codebook."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.data.images import BadImage
from dalle_cli.data.joined import sizes_of
from dalle_cli.data.picture_loader import load_eval_picture
from dalle_cli.data.source import BadSample, Source
from dalle_cli.dvae.encode import decode_tokens, encode_images
from dalle_cli.dvae.objective import codebook_perplexity, dead_codes, validation_metrics
from dalle_cli.dvae.train import load_dvae
from dalle_cli.randomness import torch_generator
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.held_out import split_rows
from dalle_cli.stores.row_set import RowSet
from dalle_cli.stores.tokens import ROWS_PER_BLOCK, TokenReader
from dalle_cli.views.contact_sheet import side_by_side

PICTURES = 16
CELL = 128
MAX_ROWS = 100_000
"""Largest number of rows on which the use of the codebook is counted."""


@dataclass(frozen=True)
class ReconstructionFigures:
    """PSNR (dB) and SSIM of each picture's reconstruction, and their means."""

    psnr: list[float]
    psnr_mean: float
    ssim: list[float]
    ssim_mean: float
    held_out: bool
    """True if training never saw these pictures."""


@dataclass(frozen=True)
class CodebookFigures:
    """Use of the codebook in a token store; ``dead`` of its ``codes`` never occur."""

    codes: int
    rows: int
    tokens: int
    dead: int
    perplexity: float


def reconstruct(checkpoint: Checkpoint, source: Source) -> tuple[ReconstructionFigures, Image.Image] | None:
    """Reconstruct the first held-out pictures, or the first training pictures if none are held out.

    Returns:
        The metrics, and a sheet of the pictures above their reconstructions; None if no picture can be read.
    """
    recipe = checkpoint.recipe()
    training_rows, held_out = split_rows(RowSet.full(len(source)), recipe, sizes_of(source))
    pictures = []
    for row in held_out if len(held_out) else training_rows:
        try:
            pictures.append(load_eval_picture(source, int(row), recipe.image_size, recipe.data))
        except (BadSample, BadImage):
            continue
        if len(pictures) == PICTURES:
            break
    if not pictures:
        return None
    objective = recipe.dvae.objective
    model, eps = load_dvae(checkpoint), objective.logit_laplace_eps
    originals = torch.from_numpy(np.stack(pictures))
    copies = decode_tokens(model, encode_images(model, originals, eps), eps).numpy()
    noise = torch_generator(recipe.seed, "report")
    metrics = validation_metrics(model, originals, eps, objective.ln_b_floor, noise)
    psnr = [round(float(value), 2) for value in metrics.psnr]
    ssim = [round(float(value), 4) for value in metrics.ssim]
    figures = ReconstructionFigures(
        psnr=psnr,
        psnr_mean=round(sum(psnr) / len(psnr), 2),
        ssim=ssim,
        ssim_mean=round(sum(ssim) / len(ssim), 4),
        held_out=bool(len(held_out)),
    )
    return figures, side_by_side(pictures, list(copies), cell=CELL)


def count_codes(store: TokenReader) -> tuple[CodebookFigures, NDArray[np.int64]] | None:
    """Return the use of the codebook in up to ``MAX_ROWS`` rows, and the counts (codes,); None without pictures."""
    if "image" not in store.parts:
        return None
    state = store.part("image")
    rows = min(state.rows, MAX_ROWS)
    counts = np.zeros(int(state.identity["codebook_size"]), dtype=np.int64)
    counted = 0
    for start in range(0, rows, ROWS_PER_BLOCK):
        block = np.arange(start, min(start + ROWS_PER_BLOCK, rows))
        usable = block[store.read("image_ok", block) > 0]
        counts += np.bincount(store.read("image", usable).ravel(), minlength=len(counts))
        counted += len(usable)
    if not counted:
        return None
    figures = CodebookFigures(
        codes=len(counts),
        rows=counted,
        tokens=int(counts.sum()),
        dead=dead_codes(torch.from_numpy(counts)),
        perplexity=round(codebook_perplexity(torch.from_numpy(counts)), 3),
    )
    return figures, counts
