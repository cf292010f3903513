"""Captions of a source to text tokens, into a token store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from dalle_cli.config.schema import Filters, Recipe, TokenizerSettings
from dalle_cli.data.filters import caption_identity, filter_captions
from dalle_cli.data.prefetch import prefetch
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import available_cores
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64, stream_seed
from dalle_cli.stores.shards import WHOLE, Shard
from dalle_cli.stores.tokens import ROWS_PER_SHARD, PartWriter
from dalle_cli.text.bpe import Tokenizer, train_bpe
from dalle_cli.text.bpe_dropout import BpeDropout
from dalle_cli.text.ragged import Ragged, running_total, spans


@dataclass(frozen=True)
class TextRows:
    """What the text part of a store holds for some consecutive rows."""

    arrays: dict[str, np.ndarray]
    reasons: dict[int, str]
    """Why rows were skipped, by their place among these."""
    counts: dict[str, int]
    """``captions`` kept, and ``overlong``: those of more than T tokens, cut or refused as the recipe says."""


@dataclass(frozen=True)
class _Captions:
    """The kept captions of n rows, one behind the other: row i has ``counts[i]`` from ``starts[i]`` on."""

    texts: list[str]
    ids: Ragged
    words: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


class CaptionEncoder:
    """Turns captions to rows by a tokenizer and the recipe's settings.

    A row's tokens depend on its captions, its number and the seed alone, not on the block it is encoded in.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TokenizerSettings, seed: int) -> None:
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.epochs = settings.dropout_epochs if settings.dropout > 0 else 0
        self._dropout: BpeDropout | None = tokenizer.dropout(settings.dropout) if self.epochs else None

    def rows(self, captions: list[list[str]], first_row: int) -> TextRows:
        """Encode the captions of each row; why a row comes without a caption is for the caller to know.

        Arrays, n rows of T = ``text_length`` tokens: ``text`` (n, T), ``text_length`` (n,) and ``caption`` (n,) are
        each row's first caption without dropout. With dropout, or where a row has several captions, also
        ``text_epochs`` (n, E, T), ``text_epochs_length`` (n, E) and ``text_versions`` (n,); where a row has several
        captions, also ``more_captions`` (n,), JSON lists of the others.
        """
        n, length = len(captions), self.settings.text_length
        kept, reasons, overlong = self._encode(captions)
        rows = np.flatnonzero(kept.counts)
        first = kept.ids.take(kept.starts[rows])
        counts = np.zeros(n, np.int64)  # of tokens: none in a row without a caption
        counts[rows] = first.counts
        arrays = {
            "text": Ragged(first.values.astype(np.uint16), counts).padded(length),
            "text_length": np.minimum(counts, length).astype(np.uint16),
            "caption": np.array([next(iter(texts), "") for texts in captions], dtype=object),
        }
        arrays["caption"][rows] = np.array(kept.texts, dtype=object)[kept.starts[rows]]
        several = np.flatnonzero(kept.counts > 1)
        if len(several) or self._dropout is not None:
            arrays |= self._versions(kept, first_row)
        if len(several):
            arrays["more_captions"] = np.full(n, "", dtype=object)
            for row in several:
                others = kept.texts[kept.starts[row] + 1 : kept.starts[row] + kept.counts[row]]
                arrays["more_captions"][row] = json.dumps(others, ensure_ascii=False)
        return TextRows(arrays, reasons, {"captions": len(kept.texts), "overlong": overlong})

    def _encode(self, captions: list[list[str]]) -> tuple[_Captions, dict[int, str], int]:
        """The captions that are kept, why rows have none of theirs, and the number of over-long ones."""
        length = self.settings.text_length
        texts = list(chain.from_iterable(captions))
        if self._dropout is None:
            ids, words = self.tokenizer.encode_block(texts), np.empty(0, np.int32)
        else:
            ids, words = self.tokenizer.encode_words(texts)
        before = running_total(np.fromiter(map(len, captions), np.int64, len(captions)))
        overlong = ids.counts > length
        keep = ids.counts > 0
        if self.settings.overlong == "refuse":
            keep &= ~overlong
        kept_before = running_total(keep)[before]
        counts = np.diff(kept_before)
        reasons: dict[int, str] = {}
        for row in np.flatnonzero((counts == 0) & (np.diff(before) > 0)).tolist():
            too_long = overlong[before[row] : before[row + 1]].any()
            reasons[row] = f"caption of more than {length} tokens" if too_long else "empty caption"
        if not keep.all():
            which = np.flatnonzero(keep)
            texts = [texts[place] for place in which]
            ids, words = _take(ids, words, which)
        return _Captions(texts, ids, words, counts, kept_before[:-1]), reasons, int(overlong.sum())

    def _versions(self, kept: _Captions, first_row: int) -> dict[str, np.ndarray]:
        """Version v of a row is its caption v mod their number, with dropout."""
        versions = np.where(kept.counts > 0, np.maximum(kept.counts, self.epochs), 0)
        most, length = int(versions.max(initial=0)), self.settings.text_length
        tokens = np.zeros((len(versions), most, length), np.uint16)
        lengths = np.zeros((len(versions), most), np.uint16)

        def fill(version: int) -> None:
            rows = np.flatnonzero(versions > version)
            ids, words = _take(kept.ids, kept.words, kept.starts[rows] + version % kept.counts[rows])
            if self._dropout is not None:
                stream = np.uint64(stream_seed(self.seed, "bpe-dropout", version))
                streams = splitmix64(stream + (rows + first_row).astype(np.uint64) * SPLITMIX_STEP)
                ids = self._dropout.drop(ids, words, streams)
            tokens[rows, version] = ids.padded(length)
            lengths[rows, version] = np.minimum(ids.counts, length)

        with ThreadPoolExecutor(available_cores()) as pool:
            list(pool.map(fill, range(most)))
        return {
            "text_epochs": tokens,
            "text_epochs_length": lengths,
            "text_versions": versions.astype(np.uint16),
        }


def _take(ids: Ragged, words: np.ndarray, which: np.ndarray) -> tuple[Ragged, np.ndarray]:
    """The captions numbered ``which``; ``words`` may be empty, where nobody needs them."""
    taken = ids.take(which)
    return taken, words[spans(ids.starts[which], taken.counts)] if len(words) else words


SHARDS_AT_ONCE = 4
"""Shards that are written and committed together: each write has a cost of its own."""


@dataclass(frozen=True)
class Tokenized:
    """What ``tokenize_source`` made."""

    path: Path
    rows: int
    skipped: int
    captions: int
    overlong: int


def train_tokenizer(recipe: Recipe, source: Source, out: Path) -> Tokenizer:
    """Train the recipe's tokenizer on the source's captions, in one pass, and write ``out/tokenizer.json``.

    Raises:
        UserError: there is no caption to train on.
    """
    with progress("train-tokenizer", len(source), "samples") as bar:

        def captions() -> Iterator[str]:
            for block in prefetch(_read(source, range(len(source)), recipe.data.filters), 1):
                yield from chain.from_iterable(block.captions)
                bar.advance(len(block.keys))
            bar.say("train-tokenizer: all captions read; merging")

        return train_bpe(captions(), recipe.tokenizer, out)


def tokenize_source(recipe: Recipe, source: Source, tokenizer: Tokenizer, out: Path, shard: Shard = WHOLE) -> Tokenized:
    """Write the text part of the store ``out``, or one share of it; goes on at the last committed row.

    Raises:
        UserError: the store was made from another source, tokenizer or settings, or the disk is full.
    """
    settings = recipe.tokenizer
    if tokenizer.vocab_size > settings.vocab_size:
        raise UserError(
            f"{tokenizer.name}: has {tokenizer.vocab_size} tokens, tokenizer.vocab_size is {settings.vocab_size}; "
            "make them agree"
        )
    identity = {
        "source": source.name,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "text_length": settings.text_length,
        "overlong": settings.overlong,
        "dropout": settings.dropout,
        "dropout_epochs": settings.dropout_epochs if settings.dropout else 0,
        "filters": caption_identity(recipe.data.filters),
        "seed": recipe.seed,
    }
    writer = PartWriter(out, "text", identity, shard)
    todo = writer.check_source(len(source))
    if not writer.complete:
        encoder = CaptionEncoder(tokenizer, settings, recipe.seed)
        # While a block is written, the next is encoded and the one after it read.
        blocks = prefetch(_encode(encoder, prefetch(_read(source, todo, recipe.data.filters), 1)), 1)
        with progress("tokenize-text", writer.rows + len(todo), "pictures", writer.rows) as bar:
            for block, found in blocks:
                skipped = {block.keys[at]: reason for at, reason in sorted((found.reasons | block.reasons).items())}
                writer.append(block.keys, found.arrays, skipped, found.counts)
                bar.advance(len(block.keys))
        writer.finish()
    counts = writer.state.get("counts", {})
    return Tokenized(
        writer.path,
        writer.rows,
        sum(writer.state["skipped"].values()),
        counts.get("captions", 0),
        counts.get("overlong", 0),
    )


def source_captions(source: Source) -> Iterator[str]:
    """All captions that can be read, in order."""
    for row in range(len(source)):
        try:
            yield from source.captions(row)
        except BadSample:
            continue


@dataclass(frozen=True)
class _Block:
    """Consecutive samples: keys, kept captions, and for those without a caption why, by their place in the block."""

    first_row: int
    keys: list[str]
    captions: list[list[str]]
    reasons: dict[int, str]


def _read(source: Source, rows: range, filters: Filters) -> Iterator[_Block]:
    filtered = caption_identity(filters) is not None
    size = SHARDS_AT_ONCE * ROWS_PER_SHARD
    for start in rows[::size]:
        some = range(start, min(start + size, rows.stop))
        block = _Block(start, [source.key(row) for row in some], [], {})
        for place, row in enumerate(some):
            captions: list[str] = []
            try:
                captions = source.captions(row)
            except BadSample as error:
                block.reasons[place] = str(error)
            else:
                if filtered:
                    captions, reason = filter_captions(captions, filters)
                    if reason is not None:
                        block.reasons[place] = reason
            block.captions.append(captions)
        yield block


def _encode(encoder: CaptionEncoder, blocks: Iterable[_Block]) -> Iterator[tuple[_Block, TextRows]]:
    for block in blocks:
        yield block, encoder.rows(block.captions, block.first_row)
