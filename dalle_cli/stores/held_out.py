"""The held-out split: rows of a token store that training leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64
from dalle_cli.stores.tokens import TokenReader

VALIDATION_BATCH = 64
"""Number of held-out rows that a prior scores at once if its recipe sets no micro_batch."""


def split_store(reader: TokenReader, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Return (training rows, held-out rows) of the rows that hold both a caption and a picture, each ascending.

    Raises:
        UserError: no row holds both, or none is left to train on.
    """
    usable = reader.usable()
    if len(usable) == 0:
        raise UserError(f"{reader.path}: holds no row with both a caption and a picture; see its skipped-*.jsonl")
    sizes = [int(size) for size in reader.part("text").identity.get("sizes", [])]
    wanted = len(recipe.data.sources)
    if wanted and wanted != max(1, len(sizes)):
        raise UserError(
            f"{reader.path}: was made from {max(1, len(sizes))} sources, the recipe names {wanted}; make them agree"
        )
    return split_rows(usable, recipe, sizes or [int(usable[-1]) + 1])


def split_rows(rows: np.ndarray, recipe: Recipe, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (training rows, held-out rows) of ``rows`` of sources with ``sizes`` samples, each ascending.

    A row of a source with weight n occurs n times among the training rows. Held-out rows are those of the source in
    ``data.validation``, which comes last, or else a share of all.

    Raises:
        UserError: no row is left to train on.
    """
    data = recipe.data
    if data.validation is None:
        training, held_out = split_holdout(rows, data.holdout, recipe.seed)
    else:
        training, held_out = np.split(rows, [np.searchsorted(rows, sum(sizes[:-1]))])
        if not len(training):
            raise UserError("data.train: holds no usable sample; see the store's skipped-*.jsonl")
    if data.weights is not None:
        ends = np.cumsum(sizes)
        training = np.repeat(training, np.array(data.weights)[np.searchsorted(ends, training, side="right")])
    return training, held_out


def held_out_captions(store: Path, recipe: Recipe, limit: int) -> list[str]:
    """Return the first ``limit`` held-out captions.

    Raises:
        UserError: the store is missing or unfinished.
    """
    reader = TokenReader(store)
    reader.require_complete()
    return reader.strings("caption", split_store(reader, recipe)[1][:limit])


def split_holdout(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (training rows, held-out rows); whether a row is held out depends on the seed and its number alone.

    At least one row is held out if ``share`` > 0 and there are two rows or more.

    Raises:
        UserError: no row is left to train on.
    """
    x = rows.astype(np.uint64) + np.uint64(seed % 2**32 * int(SPLITMIX_STEP) % 2**64)
    rank = (splitmix64(x) >> np.uint64(11)).astype(np.float64) / 2.0**53
    held_out = rank < share
    if share > 0 and len(rows) > 1 and not held_out.any():
        held_out[int(rank.argmin())] = True
    if len(rows) > 0 and held_out.all():
        raise UserError(f"data.holdout: {share} leaves none of {len(rows)} samples to train on; lower it")
    return rows[~held_out], rows[held_out]
