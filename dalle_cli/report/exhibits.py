"""The report's pictures and the figures that come with them: contact sheet, reconstructions, use of the codebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.config.schema import Recipe
from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.picture_loader import load_eval_picture
from dalle_cli.data.source import BadSample, Source
from dalle_cli.dvae.encode import decode_pictures, encode_pictures
from dalle_cli.dvae.objective import codebook_perplexity, dead_codes, validation_metrics
from dalle_cli.dvae.train import load_dvae
from dalle_cli.randomness import torch_generator
from dalle_cli.shapes.accuracy import Pool, claim_of, group_of, load_picture
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.stores.tokens import ROWS_PER_SHARD, TokenReader
from dalle_cli.views.contact_sheet import Picture, Row, contact_sheet, side_by_side

CAPTIONS = 12
OTHERS = 7
CELL = 128
PAIRS = 16
MOST_ROWS = 100_000
"""Rows of a token store that the codebook's use is counted on."""


def choose_captions(ranked: Sequence[Pool], most: int = CAPTIONS) -> list[Pool]:
    """The first captions, half with seen and half with held-out pairs as far as there are, in their order.

    Chosen by their place alone, so that the sheet shows failures as often as they happen.
    """
    held = [i for i, pool in enumerate(ranked) if (claim := claim_of(pool.prompt)) and group_of(claim) != "seen pairs"]
    seen = [i for i in range(len(ranked)) if i not in set(held)]
    from_held = min(len(held), max(most // 2, most - len(seen)))
    chosen = sorted(seen[: most - from_held] + held[:from_held])
    return [ranked[i] for i in chosen]


def samples_sheet(chosen: Sequence[Pool], true_pictures: Mapping[str, Picture], title: str) -> Image.Image:
    """The best by CLIP of each caption, framed, and others in the order they were drawn, so that they stand for a
    single sample; where true pictures are known, one of those comes first.
    """
    rows = []
    for pool in chosen:
        claim = claim_of(pool.prompt)
        best = load_picture(pool.lines[0])
        drawn = sorted(pool.lines[1:], key=lambda line: int(line.get("index", 0)))
        others = [load_picture(line) for line in drawn[:OTHERS]]
        if true_pictures:
            others.insert(0, true_pictures.get(pool.prompt, np.full_like(best, 255)))
        held_out = claim is not None and group_of(claim) == "held-out pairs"
        rows.append(Row(pool.prompt, best, others, tag="held-out pair" if held_out else None))
    others_label = "other samples, as drawn" if not true_pictures else "a true picture, then other samples as drawn"
    return contact_sheet(rows, title=title, others_label=others_label, cell=CELL)


def true_pictures(
    prompts: Sequence[str], reader: TokenReader, source: Source, image_size: int, max_pixels: int
) -> dict[str, Picture]:
    """For each prompt that is a caption of the store, the picture of the first row that has it.

    A store's row is its source's row; rows whose keys differ, of a source that has changed since, are left out.
    """
    if "text" not in reader.attributes:
        return {}
    wanted = {_plain(prompt): prompt for prompt in prompts}
    found: dict[str, Picture] = {}
    rows = min(len(reader), len(source))
    for start in range(0, rows, ROWS_PER_SHARD):
        block = range(start, min(start + ROWS_PER_SHARD, rows))
        for row, caption in zip(block, reader.strings("caption", block), strict=True):
            prompt = wanted.get(_plain(caption))
            if prompt is None or prompt in found or reader.strings("key", [row]) != [source.key(row)]:
                continue
            try:
                found[prompt] = eval_crop(decode_image(source.image_bytes(row), max_pixels), image_size)
            except (BadSample, BadImage):
                continue
        if len(found) == len(wanted):
            break
    return found


def _plain(caption: str) -> str:
    return " ".join(caption.lower().split())


@dataclass(frozen=True)
class Reconstructions:
    """Pictures beside what the dVAE makes of their codes; ``psnr`` in dB and ``ssim``, both (n,)."""

    sheet: Image.Image
    psnr: list[float]
    ssim: list[float]
    held_out: bool
    """Whether training never saw these pictures."""


def reconstructions(checkpoint: Checkpoint, source: Source) -> Reconstructions | None:
    """The first held-out pictures (the first of all where none was held out); None when none can be read."""
    recipe: Recipe = checkpoint.recipe()
    training_rows, held_out = split_holdout(np.arange(len(source)), recipe.data.holdout, recipe.seed)
    pictures = []
    for row in held_out if len(held_out) else training_rows:
        try:
            pictures.append(load_eval_picture(source, int(row), recipe.image_size, recipe.data))
        except (BadSample, BadImage):
            continue
        if len(pictures) == PAIRS:
            break
    if not pictures:
        return None
    objective = checkpoint.recipe().dvae.objective
    model, eps = load_dvae(checkpoint), objective.logit_laplace_eps
    originals = torch.from_numpy(np.stack(pictures))
    copies = decode_pictures(model, encode_pictures(model, originals, eps), eps).numpy()
    noise = torch_generator(recipe.seed, "report")
    found = validation_metrics(model, originals.permute(0, 3, 1, 2), eps, objective.ln_b_floor, noise)
    psnr, ssim = [round(float(value), 2) for value in found.psnr], [round(float(value), 4) for value in found.ssim]
    sheet = side_by_side(pictures, list(copies), cell=CELL)
    return Reconstructions(sheet, psnr, ssim, bool(len(held_out)))


@dataclass(frozen=True)
class CodebookUse:
    """How often each code (K,) stands in the token store's pictures."""

    counts: NDArray[np.int64]
    rows: int

    @property
    def perplexity(self) -> float:
        return codebook_perplexity(torch.from_numpy(self.counts))

    @property
    def dead(self) -> int:
        return dead_codes(torch.from_numpy(self.counts))


def codebook_use(reader: TokenReader) -> CodebookUse | None:
    """Counts over the store's pictures, at most ``MOST_ROWS``; None when it has none."""
    if "image" not in reader.attributes:
        return None
    state = reader.part("image")
    rows = min(int(state["rows"]), MOST_ROWS)
    counts = np.zeros(int(state["identity"]["codebook_size"]), dtype=np.int64)
    counted = 0
    for start in range(0, rows, ROWS_PER_SHARD):
        block = np.arange(start, min(start + ROWS_PER_SHARD, rows))
        ok = block[reader.read("image_ok", block) > 0]
        counts += np.bincount(reader.read("image", ok).ravel(), minlength=len(counts))
        counted += len(ok)
    return CodebookUse(counts, counted) if counted else None
