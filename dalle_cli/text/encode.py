"""The encoder of captions for training, sampling and reranking, with one policy for over-long captions."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.data.workers import available_cores
from dalle_cli.errors import UserError
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64, stream_seed
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.bpe_dropout import BpeDropout
from dalle_cli.text.ragged import Ragged, running_total, spans


@dataclass(frozen=True)
class TextRows:
    """Arrays of a token store's text part for consecutive rows; see ``CaptionEncoder.rows``."""

    arrays: dict[str, np.ndarray]
    reasons: dict[int, str]
    """Reason of each skipped row, by its index in the block."""
    counts: dict[str, int]
    """Number of usable ``captions`` and of ``overlong`` ones, which were cut or refused."""


@dataclass(frozen=True)
class _UsableCaptions:
    """Captions of n rows, concatenated: row i has ``counts[i]`` of them, from index ``starts[i]``."""

    texts: list[str]
    ids: Ragged
    words: np.ndarray
    counts: np.ndarray
    starts: np.ndarray


class CaptionEncoder:
    """Encoder of captions with a tokenizer and the recipe's tokenizer settings.

    Captions of more than ``text_length`` tokens are cut or refused, according to the setting ``overlong``; ``cut`` is
    the number of captions that ``encode`` has cut so far. ``seed`` is that of BPE dropout, which only ``rows`` applies.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TokenizerSettings, seed: int = 0) -> None:
        self.tokenizer, self.settings, self.seed = tokenizer, settings, seed
        self.cut = 0

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens (n, text_length) int64 without dropout, padded with zeros, and their counts (n,) int64.

        Raises:
            UserError: a caption has more than ``text_length`` tokens, and ``overlong`` is ``refuse``.
        """
        length, ids = self.settings.text_length, self.tokenizer.encode(captions)
        overlong = np.flatnonzero(ids.counts > length)
        if len(overlong) and self.settings.overlong == "refuse":
            first = overlong[0]
            raise UserError(
                f"the caption {captions[first][:40]!r}... has {ids.counts[first]} tokens, the model reads {length} "
                "and refuses longer ones (tokenizer.overlong); shorten it"
            )
        self.cut += len(overlong)
        return ids.padded(length).astype(np.int64), np.minimum(ids.counts, length)

    def rows(self, captions: list[list[str]], first_row: int) -> TextRows:
        """Encode the captions of consecutive rows into the arrays of a token store; see ``stores.tokens``.

        A row's tokens depend on its captions, its number and the seed alone, not on the block it is encoded in. The
        caller reports the rows that have no captions.
        """
        n, length = len(captions), self.settings.text_length
        usable, reasons, overlong = self._encode_usable(captions)
        rows = np.flatnonzero(usable.counts)
        first = usable.ids.take(usable.starts[rows])
        counts = np.zeros(n, np.int64)  # number of tokens, 0 in a row without a caption
        counts[rows] = first.counts
        arrays = {
            "text": Ragged(first.values.astype(np.uint16), counts).padded(length),
            "text_length": np.minimum(counts, length).astype(np.uint16),
            "caption": np.array([next(iter(texts), "") for texts in captions], dtype=object),
        }
        arrays["caption"][rows] = np.array(usable.texts, dtype=object)[usable.starts[rows]]
        several = np.flatnonzero(usable.counts > 1)
        if len(several) or self._dropout is not None:
            arrays |= self._versions(usable, first_row)
        if len(several):
            arrays["more_captions"] = np.full(n, "", dtype=object)
            for row in several:
                others = usable.texts[usable.starts[row] + 1 : usable.starts[row] + usable.counts[row]]
                arrays["more_captions"][row] = json.dumps(others, ensure_ascii=False)
        return TextRows(arrays, reasons, {"captions": len(usable.texts), "overlong": overlong})

    @property
    def _epochs(self) -> int:
        return self.settings.dropout_epochs if self.settings.dropout > 0 else 0

    @cached_property
    def _dropout(self) -> BpeDropout | None:
        return self.tokenizer.dropout(self.settings.dropout) if self._epochs else None

    def _encode_usable(self, captions: list[list[str]]) -> tuple[_UsableCaptions, dict[int, str], int]:
        """Return the usable captions, the reason of each row that has none, and the number of over-long captions."""
        length = self.settings.text_length
        texts = list(chain.from_iterable(captions))
        if self._dropout is None:
            ids, words = self.tokenizer.encode(texts), np.empty(0, np.int32)
        else:
            ids, words = self.tokenizer.encode_words(texts)
        before = running_total(np.fromiter(map(len, captions), np.int64, len(captions)))
        overlong = ids.counts > length
        usable = ids.counts > 0
        if self.settings.overlong == "refuse":
            usable &= ~overlong
        usable_before = running_total(usable)[before]
        counts = np.diff(usable_before)
        reasons: dict[int, str] = {}
        for row in np.flatnonzero((counts == 0) & (np.diff(before) > 0)).tolist():
            too_long = overlong[before[row] : before[row + 1]].any()
            reasons[row] = f"caption of more than {length} tokens" if too_long else "empty caption"
        if not usable.all():
            indices = np.flatnonzero(usable)
            texts = [texts[index] for index in indices]
            ids, words = _take(ids, words, indices)
        return _UsableCaptions(texts, ids, words, counts, usable_before[:-1]), reasons, int(overlong.sum())

    def _versions(self, usable: _UsableCaptions, first_row: int) -> dict[str, np.ndarray]:
        """Return the tokens of each epoch: version v of a row with k captions is caption v mod k, with dropout."""
        versions = np.where(usable.counts > 0, np.maximum(usable.counts, self._epochs), 0)
        most, length = int(versions.max(initial=0)), self.settings.text_length
        tokens = np.zeros((len(versions), most, length), np.uint16)
        lengths = np.zeros((len(versions), most), np.uint16)

        def fill(version: int) -> None:
            rows = np.flatnonzero(versions > version)
            ids, words = _take(usable.ids, usable.words, usable.starts[rows] + version % usable.counts[rows])
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


def _take(ids: Ragged, words: np.ndarray, indices: np.ndarray) -> tuple[Ragged, np.ndarray]:
    """Return the captions at ``indices``; ``words`` may be empty, without dropout."""
    taken = ids.take(indices)
    return taken, words[spans(ids.starts[indices], taken.counts)] if len(words) else words
