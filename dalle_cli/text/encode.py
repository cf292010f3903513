"""The encoder of captions for training, sampling and reranking, with one policy for over-long captions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.errors import UserError
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.bpe_dropout import BpeDropout
from dalle_cli.text.ragged import Ragged, running_total


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
    counts: np.ndarray
    starts: np.ndarray


class CaptionEncoder:
    """Encoder of captions with a tokenizer and the recipe's tokenizer settings.

    Captions of more than ``text_length`` tokens are cut or refused, according to the setting ``overlong``; ``cut`` is
    the number of captions that ``encode`` has cut so far.
    """

    def __init__(self, tokenizer: Tokenizer, settings: TokenizerSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
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

    def encode_with_dropout(self, captions: list[str], streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens (n, text_length) uint16 with BPE dropout, padded with zeros, and their counts (n,) uint16.

        A caption's tokens depend on it and its random stream, from ``streams`` (n,) uint64, alone. More tokens than
        ``text_length`` are cut.
        """
        length, (ids, words) = self.settings.text_length, self.tokenizer.encode_words(captions)
        ids = self._dropout.drop(ids, words, streams)
        return ids.padded(length).astype(np.uint16), np.minimum(ids.counts, length).astype(np.uint16)

    def rows(self, captions: list[list[str]]) -> TextRows:
        """Encode the captions of some rows into the arrays of a token store; see ``stores.tokens``.

        A row's tokens depend on its captions alone, not on the block it is encoded in. The caller reports the rows that
        have no captions.
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
        if len(several):
            if not self.settings.dropout:
                arrays |= self._versions(usable)
            arrays["more_captions"] = np.full(n, "", dtype=object)
            for row in several:
                others = usable.texts[usable.starts[row] + 1 : usable.starts[row] + usable.counts[row]]
                arrays["more_captions"][row] = json.dumps(others, ensure_ascii=False)
        return TextRows(arrays, reasons, {"captions": len(usable.texts), "overlong": overlong})

    @cached_property
    def _dropout(self) -> BpeDropout:
        return self.tokenizer.dropout(self.settings.dropout)

    def _encode_usable(self, captions: list[list[str]]) -> tuple[_UsableCaptions, dict[int, str], int]:
        """Return the usable captions, the reason of each row that has none, and the number of over-long captions."""
        length = self.settings.text_length
        texts = list(chain.from_iterable(captions))
        ids = self.tokenizer.encode(texts)
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
            ids = ids.take(indices)
        return _UsableCaptions(texts, ids, counts, usable_before[:-1]), reasons, int(overlong.sum())

    def _versions(self, usable: _UsableCaptions) -> dict[str, np.ndarray]:
        """Return the tokens of each caption: version v of a row is its caption v."""
        most, length = int(usable.counts.max(initial=0)), self.settings.text_length
        tokens = np.zeros((len(usable.counts), most, length), np.uint16)
        lengths = np.zeros((len(usable.counts), most), np.uint16)
        for version in range(most):
            rows = np.flatnonzero(usable.counts > version)
            ids = usable.ids.take(usable.starts[rows] + version)
            tokens[rows, version] = ids.padded(length)
            lengths[rows, version] = np.minimum(ids.counts, length)
        return {
            "text_epochs": tokens,
            "text_epochs_length": lengths,
            "text_versions": usable.counts.astype(np.uint16),
        }
