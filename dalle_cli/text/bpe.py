"""BPE captions: training with the ``tokenizers`` library, encoding, and reproducible BPE dropout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.recipes.schema import TokenizerSettings
from dalle_cli.stores.files import write_atomically
from dalle_cli.training.randomness import numpy_generator

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HFTokenizer


class Tokenizer:
    """A trained BPE tokenizer: byte-level, on lower-cased NFC text."""

    def __init__(self, backend: HFTokenizer, name: str) -> None:
        self.backend, self.name = backend, name
        # One canonical serialisation, so that the hash does not depend on how the file was laid out.
        self.identity = hashlib.sha256(backend.to_str().encode()).hexdigest()
        model = json.loads(backend.to_str())["model"]
        self._vocab: dict[str, int] = model["vocab"]
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json``, or that file in a folder.

        Raises:
            UserError: it is missing, or no BPE tokenizer.
        """
        from tokenizers import Tokenizer as HFTokenizer

        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file}: no such tokenizer; make one with dalle train-tokenizer")
        try:
            backend = HFTokenizer.from_file(str(file))
            kind = json.loads(backend.to_str())["model"]["type"]
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file}: not a tokenizer file: {error}") from None
        if kind != "BPE":
            raise UserError(f"{file}: is a {kind} tokenizer; a BPE tokenizer is needed")
        return cls(backend, str(file))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, captions: list[str]) -> list[list[int]]:
        """Token ids of each caption, as many as it takes."""
        return [list(e.ids) for e in self.backend.encode_batch(captions, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption that ``ids`` spell."""
        return str(self.backend.decode(list(ids)))

    def encode_dropped(self, caption: str, dropout: float, rng: np.random.Generator) -> list[int]:
        """Token ids with BPE dropout (Provilkov et al. 2020): each possible merge is skipped with chance ``dropout``.

        Written here because the library draws its dropout from a generator that cannot be seeded.
        """
        text = self.backend.normalizer.normalize_str(caption)
        ids: list[int] = []
        for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(text):
            ids += self._merge(list(word), dropout, rng)
        return ids

    def _merge(self, symbols: list[str], dropout: float, rng: np.random.Generator) -> list[int]:
        while len(symbols) > 1:
            kept = rng.random(len(symbols) - 1) >= dropout
            candidates = [
                (rank, i)
                for i, pair in enumerate(pairwise(symbols))
                if kept[i] and (rank := self._ranks.get(pair)) is not None
            ]
            if not candidates:
                break
            _, i = min(candidates)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [self._vocab[symbol] for symbol in symbols]


def train_bpe(captions: Iterable[str], settings: TokenizerSettings, out: Path) -> Tokenizer:
    """Train a byte-level BPE on ``captions`` (one streamed pass) and write ``out/tokenizer.json``.

    Raises:
        UserError: there is no caption to train on.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    backend = HFTokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for caption in captions:
            seen += 1
            yield caption

    backend.train_from_iterator(counted(), trainer)
    if seen == 0:
        raise UserError(f"{out}: there is no caption to train a tokenizer on; look at the source's captions")
    write_atomically(out / "tokenizer.json", backend.to_str(pretty=True))
    return Tokenizer.load(out)


def caption_rows(
    tokenizer: Tokenizer, captions: list[str], settings: TokenizerSettings, seed: int, first_row: int
) -> tuple[dict[str, np.ndarray], list[str | None]]:
    """Arrays of the text part for consecutive rows, and for each row why it was skipped, if it was.

    Returns ``text`` (n, T) and ``text_length`` (n,) uint16, and with dropout ``text_dropped`` (n, E, T) and
    ``text_dropped_length`` (n, E). An empty caption and, if so set, one of more than T tokens are skipped: length 0.
    The dropout of a row depends on (seed, version, row) alone.
    """
    n, length = len(captions), settings.text_length
    versions = settings.dropout_epochs if settings.dropout > 0 else 0
    text, lengths = np.zeros((n, length), np.uint16), np.zeros(n, np.uint16)
    dropped = np.zeros((n, versions, length), np.uint16)
    dropped_lengths = np.zeros((n, versions), np.uint16)
    reasons: list[str | None] = [None] * n
    for i, ids in enumerate(tokenizer.encode(captions)):
        if not ids:
            reasons[i] = "empty caption"
            continue
        if len(ids) > length and settings.overlong == "refuse":
            reasons[i] = f"caption of more than {length} tokens"
            continue
        lengths[i] = _fill(text[i], ids)
        for version in range(versions):
            rng = numpy_generator(seed, "bpe-dropout", version, first_row + i)
            ids = tokenizer.encode_dropped(captions[i], settings.dropout, rng)
            dropped_lengths[i, version] = _fill(dropped[i, version], ids)
    arrays = {"text": text, "text_length": lengths}
    if versions:
        arrays |= {"text_dropped": dropped, "text_dropped_length": dropped_lengths}
    return arrays, reasons


def _fill(row: np.ndarray, ids: list[int]) -> int:
    ids = ids[: len(row)]
    row[: len(ids)] = ids
    return len(ids)
