"""The held-out split: rows of a token store that training leaves out."""

from __future__ import annotations

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
    return split_holdout(usable, recipe.data.holdout, recipe.seed)


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
