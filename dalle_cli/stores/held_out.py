"""Which rows of a token store training leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64
from dalle_cli.stores.tokens import TokenReader

VALIDATION_BATCH = 64
"""Held-out rows that a prior scores at once where its recipe sets no micro_batch."""


def split_store(reader: TokenReader, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows) among those with both a caption and a picture, each ascending.

    Raises:
        UserError: there is no such row.
    """
    usable = reader.usable()
    if len(usable) == 0:
        raise UserError(f"{reader.path}: holds no row with both a caption and a picture; see its skipped-*.jsonl")
    return split_holdout(usable, recipe.data.holdout, recipe.seed)


def held_out_captions(store: Path, recipe: Recipe, limit: int) -> list[str]:
    """The first captions left out of training.

    Raises:
        UserError: the store is missing or unfinished.
    """
    reader = TokenReader(store)
    reader.require_complete()
    return reader.strings("caption", split_store(reader, recipe)[1][:limit])


def split_holdout(rows: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows): whether a row is held out depends on (seed, row) alone, not on the set's size.

    At least one row is held out when ``share`` > 0 and there are two rows.

    Raises:
        UserError: no row is left to train on.
    """
    x = rows.astype(np.uint64) + np.uint64(seed % 2**32 * int(SPLITMIX_STEP) % 2**64)
    rank = (splitmix64(x) >> np.uint64(11)).astype(np.float64) / 2.0**53
    held = rank < share
    if share > 0 and len(rows) > 1 and not held.any():
        held[int(rank.argmin())] = True
    if len(rows) > 0 and held.all():
        raise UserError(f"data.holdout: {share} leaves none of {len(rows)} samples to train on; lower it")
    return rows[~held], rows[held]
