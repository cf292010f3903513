"""Captions of consecutive samples as the rows of a token store."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dalle_cli.data.workers import cores
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64, stream_seed
from dalle_cli.recipes.schema import TokenizerSettings
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.dropout import BpeDropout
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

        with ThreadPoolExecutor(cores()) as pool:
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
