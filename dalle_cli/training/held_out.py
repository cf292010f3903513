"""Which rows of a token store training leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.order import split_holdout

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
