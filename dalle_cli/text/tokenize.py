"""Training the tokenizer on a source's captions, and writing their text tokens into a token store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from dalle_cli.config.schema import Filters, Recipe
from dalle_cli.data.captions import MOST_CAPTIONS, filtered_captions
from dalle_cli.data.filters import caption_identity
from dalle_cli.data.joined import sizes_of
from dalle_cli.data.prefetch import prefetch
from dalle_cli.data.read_ahead import rows_ahead
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64, stream_seed
from dalle_cli.stores.shards import WHOLE, Shard
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import ROWS_PER_BLOCK, TOKENIZER
from dalle_cli.text.bpe import Tokenizer, train_bpe
from dalle_cli.text.encode import CaptionEncoder, TextRows

BLOCKS_AT_ONCE = 4
"""Number of blocks written and committed together, since each write has a fixed cost."""
HASHED_AT_ONCE = 2**22
LEFT_OUT = "captions_left_out"
"""Name of the count of captions beyond the first MOST_CAPTIONS of their pictures."""


@dataclass(frozen=True)
class Tokenized:
    """Store and counts of a finished ``tokenize_source``."""

    path: Path
    rows: int
    skipped: int
    captions: int
    overlong: int
    left_out: int
    """Number of captions beyond the first MOST_CAPTIONS of their pictures."""


def train_tokenizer(recipe: Recipe, source: Source, out: Path, most: int | None = None) -> Tokenizer:
    """Train the recipe's tokenizer on the source's captions, in one pass, and write ``out/tokenizer.json``.

    ``most`` is the number of samples whose captions suffice; about so many, spread over the source, are read then.

    Raises:
        UserError: there is no caption to train on.
    """
    rows = _chosen_rows(len(source), most, recipe.seed)
    with progress("train-tokenizer", len(rows), "samples") as bar:

        def captions() -> Iterator[str]:
            skipped, first = 0, ""
            for block in prefetch(_read(source, rows, recipe.data.filters, BLOCKS_AT_ONCE * ROWS_PER_BLOCK), 1):
                yield from chain.from_iterable(block.captions)
                skipped += len(block.reasons)
                first = first or next((f"{block.keys[row]}: {why}" for row, why in block.reasons.items()), "")
                bar.advance(len(block.keys))
            if skipped:
                bar.say(f"train-tokenizer: {skipped} of {len(rows)} samples skipped; the first is {first}")
            bar.say("train-tokenizer: all captions read; merging")

        return train_bpe(captions(), recipe.tokenizer, out)


def _chosen_rows(samples: int, most: int | None, seed: int) -> Sequence[int]:
    """Return all rows if they are at most ``most``, else about so many, each chosen by a hash of its number."""
    if most is None or samples <= most:
        return range(samples)
    chosen = []
    for start in range(0, samples, HASHED_AT_ONCE):
        rows = np.arange(start, min(start + HASHED_AT_ONCE, samples), dtype=np.uint64)
        hashed = splitmix64(np.uint64(stream_seed(seed, "tokenizer")) + rows * SPLITMIX_STEP) >> np.uint64(11)
        chosen.append(rows[hashed < np.uint64(most / samples * 2.0**53)].astype(np.int64))
    found: list[int] = np.concatenate(chosen).tolist()
    return found


def tokenize_source(recipe: Recipe, source: Source, tokenizer: Tokenizer, out: Path, shard: Shard = WHOLE) -> Tokenized:
    """Write the text part of the store ``out``, or one share of it; resume at the last committed row.

    Raises:
        UserError: the store was made from another source, tokenizer or settings, another process is writing this share,
            or the disk is full.
    """
    settings = recipe.tokenizer
    if tokenizer.vocab_size > settings.vocab_size:
        raise UserError(
            f"{tokenizer.name}: has {tokenizer.vocab_size} tokens, tokenizer.vocab_size is {settings.vocab_size}; "
            "make them agree"
        )
    identity = {
        "source": source.identity,
        "source_name": source.name,
        **({"sizes": sizes} if len(sizes := sizes_of(source)) > 1 else {}),
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "text_length": settings.text_length,
        "overlong": settings.overlong,
        "dropout": settings.dropout,
        "filters": caption_identity(recipe.data.filters),
        "seed": recipe.seed,
    }
    with PartWriter(out, "text", identity, len(source), shard) as writer:
        if todo := writer.todo:
            encoder = CaptionEncoder(tokenizer, settings)
            if settings.dropout:
                writer.add_file(TOKENIZER, tokenizer.json)  # training encodes the captions anew in each epoch
            size = max(BLOCKS_AT_ONCE * ROWS_PER_BLOCK, writer.rows_per_shard)
            # While one block is written, the next is encoded and the one after that is read.
            blocks = prefetch(_encode(encoder, prefetch(_read(source, todo, recipe.data.filters, size), 1)), 1)
            with progress("tokenize-text", writer.rows + len(todo), "pictures", writer.rows) as bar:
                for block, text in blocks:
                    counts = {**text.counts, **({LEFT_OUT: block.left_out} if block.left_out else {})}
                    reasons = sorted((text.reasons | block.reasons).items())
                    skipped = {block.keys[row]: reason for row, reason in reasons}
                    writer.append(block.keys, text.arrays, skipped, counts)
                    bar.advance(len(block.keys))
        writer.finish()
    made = writer.progress
    captions, overlong, left_out = (made.counts.get(name, 0) for name in ("captions", "overlong", LEFT_OUT))
    return Tokenized(out, made.rows, sum(made.skipped.values()), captions, overlong, left_out)


@dataclass
class _Block:
    """Keys and filtered captions of consecutive samples, and the reason, by index, of each without a caption."""

    keys: list[str]
    captions: list[list[str]]
    reasons: dict[int, str]
    left_out: int = 0


def _read(source: Source, rows: Sequence[int], filters: Filters, size: int) -> Iterator[_Block]:
    active = filters if caption_identity(filters) is not None else None
    upcoming = rows_ahead(source, rows, "captions")
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        block = _Block([source.key(row) for row in some], [], {})
        for index, row in enumerate(islice(upcoming, len(some))):
            captions, reason = filtered_captions(source, row, active)
            block.captions.append(captions[:MOST_CAPTIONS])
            block.left_out += max(0, len(captions) - MOST_CAPTIONS)
            if reason is not None:
                block.reasons[index] = reason
        yield block


def _encode(encoder: CaptionEncoder, blocks: Iterable[_Block]) -> Iterator[tuple[_Block, TextRows]]:
    for block in blocks:
        yield block, encoder.rows(block.captions)
