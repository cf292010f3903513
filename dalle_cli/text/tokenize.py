"""Captions of a source to text tokens, into a token store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dalle_cli.data.sources import BadSample, Source
from dalle_cli.progress import progress
from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.tokens import ROWS_PER_SHARD, PartWriter
from dalle_cli.text.bpe import Tokenizer, caption_rows


def source_captions(source: Source) -> Iterator[str]:
    """The captions that can be read, in order."""
    for row in range(len(source)):
        try:
            yield source.caption(row)
        except BadSample:
            continue


def tokenize_source(recipe: Recipe, source: Source, tokenizer: Tokenizer, out: Path) -> dict[str, int]:
    """Write the text part of the store ``out``; goes on at the last committed row. Returns rows and skipped rows.

    Raises:
        UserError: the store was made from another source, tokenizer or settings, or the disk is full.
    """
    settings = recipe.tokenizer
    identity = {
        "source": source.name,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "text_length": settings.text_length,
        "overlong": settings.overlong,
        "dropout": settings.dropout,
        "dropout_epochs": settings.dropout_epochs if settings.dropout else 0,
        "seed": recipe.seed,
    }
    writer = PartWriter(out, "text", identity)
    writer.check_source(len(source))
    if not writer.complete:
        with progress("tokenize-text", len(source), "captions", writer.rows) as bar:
            while writer.rows < len(source):
                first = writer.rows
                rows = range(first, min(first + ROWS_PER_SHARD, len(source)))
                captions, reasons = _read(source, rows)
                arrays, found = caption_rows(tokenizer, captions, settings, recipe.seed, first)
                keys = [source.key(row) for row in rows]
                skipped = {
                    key: reason
                    for key, *both in zip(keys, reasons, found, strict=True)
                    if (reason := both[0] or both[1]) is not None
                }
                arrays["caption"] = np.array(captions, dtype=object)
                writer.append(keys, arrays, skipped)
                bar.advance(len(rows))
        writer.finish()
    return {"rows": writer.rows, "skipped": sum(writer.state["skipped"].values())}


def _read(source: Source, rows: range) -> tuple[list[str], list[str | None]]:
    captions: list[str] = []
    reasons: list[str | None] = []
    for row in rows:
        try:
            captions.append(source.caption(row))
            reasons.append(None)
        except BadSample as error:
            captions.append("")
            reasons.append(str(error))
    return captions, reasons
