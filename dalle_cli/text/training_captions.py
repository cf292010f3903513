"""Captions as training sees them: in each epoch another caption of a picture, with BPE dropout drawn anew."""

from __future__ import annotations

import numpy as np

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.errors import Damaged
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64, stream_seed
from dalle_cli.stores.tokens import AGAIN, TOKENIZER, TokenReader, caption_turns
from dalle_cli.stores.typed import as_type
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.encode import CaptionEncoder


class TrainingCaptions:
    """Text tokens of a store's rows, epoch by epoch (paper, section 2.2).

    They depend on the store, the row and the epoch alone, so that a resumed run sees the same. A store of an earlier
    version holds some versions of each caption with dropout, which take turns.

    Raises:
        UserError: the store has BPE dropout, and its tokenizer is missing or not the one that it was made with.
    """

    def __init__(self, reader: TokenReader) -> None:
        self.reader, made_with = reader, reader.part("text").identity
        self._encoder: CaptionEncoder | None = None
        if made_with.get("dropout") and "dropout_epochs" not in made_with:
            file = reader.path / TOKENIZER
            if not file.is_file():
                raise Damaged(f"{file}: is missing; {AGAIN}")
            tokenizer = Tokenizer.load(file)
            if tokenizer.identity != made_with["tokenizer"]:
                raise Damaged(f"{file}: is not the tokenizer that the store was made with; {AGAIN}")
            settings = {name: made_with[name] for name in ("text_length", "dropout", "overlong")}
            self._encoder = CaptionEncoder(tokenizer, as_type(TokenizerSettings, settings, reader.path))
            self._seed = int(made_with["seed"])

    def read(self, rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens (n, T) uint16 and their counts (n,) uint16 of ``rows`` (n,) in ``epochs`` (n,)."""
        if self._encoder is None:
            return self.reader.epoch_text(rows, epochs)
        found = [texts or [""] for texts in self.reader.captions(rows)]
        turns = caption_turns(rows, epochs, np.array([len(texts) for texts in found]))
        captions = [texts[turn] for texts, turn in zip(found, turns.tolist(), strict=True)]
        seeds = {epoch: stream_seed(self._seed, "bpe-dropout", epoch) for epoch in set(epochs.tolist())}
        streams = np.array([seeds[epoch] for epoch in epochs.tolist()], np.uint64)
        return self._encoder.encode_with_dropout(captions, splitmix64(streams + rows.astype(np.uint64) * SPLITMIX_STEP))
