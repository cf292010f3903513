"""Which rows of a token store training leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.order import split_holdout


def held_out_rows(reader: TokenReader, recipe: Recipe) -> np.ndarray:
    """Usable rows that no stage trained by ``recipe`` has seen, ascending."""
    return split_holdout(reader.usable(), recipe.data.holdout, recipe.seed)[1]


def held_out_captions(store: Path, recipe: Recipe, limit: int) -> list[str]:
    """The first captions left out of training.

    Raises:
        UserError: the store is missing or unfinished.
    """
    reader = TokenReader(store)
    reader.require_complete()
    return reader.strings("caption", held_out_rows(reader, recipe)[:limit])
