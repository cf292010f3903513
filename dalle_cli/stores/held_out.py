"""The held-out split: rows of a token store that training leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64
from dalle_cli.stores.row_set import RowSet
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows

VALIDATION_BATCH = 64
"""Number of held-out rows that a prior scores at once if its recipe sets no micro_batch."""
CACHED = 2**14
"""Number of rows whose random numbers, 8 bytes each, stay in a processor's cache while they are drawn."""


def split_store(reader: TokenReader, recipe: Recipe, *, keep: bool = True) -> tuple[RowSet, np.ndarray]:
    """Return (training rows, held-out rows) of the rows that hold both a caption and a picture, each ascending.

    Unless ``keep``, nothing is written into a store that does not keep its usable rows yet.

    Raises:
        UserError: no row holds both, or none is left to train on.
    """
    usable = usable_rows(reader, keep=keep)
    if len(usable) == 0:
        raise UserError(f"{reader.path}: holds no row with both a caption and a picture; see its skipped-*.jsonl")
    sizes = [int(size) for size in reader.part("text").identity.get("sizes", [])]
    wanted = len(recipe.data.sources)
    if wanted and wanted != max(1, len(sizes)):
        raise UserError(
            f"{reader.path}: was made from {max(1, len(sizes))} sources, the recipe names {wanted}; make them agree"
        )
    return split_rows(usable, recipe, sizes or [len(reader)])


def split_rows(rows: RowSet, recipe: Recipe, sizes: Sequence[int]) -> tuple[RowSet, np.ndarray]:
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
        border = sum(sizes[:-1])
        training = rows.below(border)
        held_out = np.concatenate([np.empty(0, np.int64), *(chunk[chunk >= border] for chunk in rows.chunks())])
        if not len(training):
            raise UserError("data.train: holds no usable sample; see the store's skipped-*.jsonl")
    if data.weights is not None:
        training = training.weighted(list(zip(accumulate(sizes), data.weights, strict=False)))
    return training, held_out


def held_out_captions(store: Path, recipe: Recipe, limit: int) -> list[str]:
    """Return the first ``limit`` held-out captions.

    Raises:
        UserError: the store is missing or unfinished.
    """
    reader = TokenReader(store)
    reader.require_complete()
    return reader.strings("caption", split_store(reader, recipe)[1][:limit])


def split_holdout(rows: RowSet, share: float, seed: int) -> tuple[RowSet, np.ndarray]:
    """Return (training rows, held-out rows); whether a row is held out depends on the seed and its number alone.

    At least one row is held out if ``share`` > 0 and there are two rows or more.

    Raises:
        UserError: no row is left to train on.
    """
    limit, found = np.uint64(math.ceil(share * 2.0**53)), [np.empty(0, np.int64)]
    # Few rows are held out: those that are drawn from all numbers, as many at a time as a cache holds, are looked up.
    for first in range(0, rows.stop if share > 0 else 0, CACHED):
        numbers = np.arange(first, min(first + CACHED, rows.stop))
        found.append(numbers[_ranks(numbers, seed) < limit])
    drawn = np.concatenate(found)
    held_out = drawn[rows.contains(drawn)]
    if share > 0 and len(rows) > 1 and not len(held_out):
        every = np.asarray(rows)
        held_out = every[[_ranks(every, seed).argmin()]]
    if 0 < len(rows) == len(held_out):
        raise UserError(f"data.holdout: {share} leaves none of {len(rows)} samples to train on; lower it")
    return rows.without(held_out), held_out


def _ranks(rows: np.ndarray, seed: int) -> np.ndarray:
    """Return a random number of 53 bits for each row, uint64."""
    ranks = splitmix64(rows.astype(np.uint64) + np.uint64(seed % 2**32 * int(SPLITMIX_STEP) % 2**64))
    ranks >>= np.uint64(11)
    return ranks
