"""Byte-level BPE of captions with the ``tokenizers`` library: training and encoding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.errors import UserError
from dalle_cli.stores.checksums import write_checksums
from dalle_cli.stores.files import write_atomically
from dalle_cli.stores.places import Place
from dalle_cli.text.bpe_dropout import BpeDropout
from dalle_cli.text.ragged import Ragged

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as HFTokenizer

ENCODED_AT_ONCE = 4096
"""Number of captions in a call to the library: enough for all cores; its results take kilobytes per caption."""


class Tokenizer:
    """A trained byte-level BPE tokenizer for lower-cased NFC text."""

    def __init__(self, backend: HFTokenizer, name: str) -> None:
        self.backend, self.name = backend, name
        self.json = backend.to_str()
        """Canonical content of its file, whose hash does not depend on the file's layout."""
        self.identity = hashlib.sha256(self.json.encode()).hexdigest()
        # A file may set these three, but the recipe decides on dropout and length.
        backend.model.dropout = None
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def load(cls, path: Place) -> Tokenizer:
        """Read the file ``path``, or ``tokenizer.json`` in the folder ``path``.

        Raises:
            UserError: the file is missing, or is no BPE tokenizer.
        """
        from tokenizers import Tokenizer as HFTokenizer

        file = path / "tokenizer.json" if isinstance(path, Path) and path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{file}: no such tokenizer; make one with dalle train-tokenizer")
        try:
            backend = HFTokenizer.from_str(file.read_bytes().decode())
            kind = json.loads(backend.to_str())["model"]["type"]
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file}: not a tokenizer file: {error}") from None
        if kind != "BPE":
            raise UserError(f"{file}: is a {kind} tokenizer; a BPE tokenizer is needed")
        return cls(backend, str(file))

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, captions: list[str]) -> Ragged:
        """Return the token ids of each caption, int32, uncut."""
        encode = self.backend.encode_batch_fast
        return Ragged.joined([_flat(encode(part, add_special_tokens=False), "ids") for part in _parts(captions)])

    def encode_words(self, captions: list[str]) -> tuple[Ragged, np.ndarray]:
        """Return the token ids, as ``encode`` does, and the number (total,) of each token's word in its caption.

        This encodes in the calling thread only, since training, which calls it, has work for the other cores.
        """
        encodings = [self.backend.encode(caption, add_special_tokens=False) for caption in captions]
        return _flat(encodings, "ids"), _flat(encodings, "word_ids").values

    def decode(self, ids: Iterable[int]) -> str:
        """Return the caption that ``ids`` spell."""
        return str(self.backend.decode(list(ids)))

    def dropout(self, p: float) -> BpeDropout:
        """Return BPE dropout that skips each of this tokenizer's merges with probability ``p``."""
        model = json.loads(self.backend.to_str())["model"]
        prefix = model.get("continuing_subword_prefix") or ""
        return BpeDropout(self.backend.get_vocab(), model["merges"], p, prefix)


def _parts(captions: list[str]) -> Iterator[list[str]]:
    """Yield ``captions`` in parts of ENCODED_AT_ONCE, at least one part."""
    for start in range(0, max(1, len(captions)), ENCODED_AT_ONCE):
        yield captions[start : start + ENCODED_AT_ONCE]


def _flat(encodings: list[Encoding], name: Literal["ids", "word_ids"]) -> Ragged:
    counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
    values = chain.from_iterable(map(attrgetter(name), encodings))
    return Ragged(np.fromiter(values, np.int32, int(counts.sum())), counts)


def train_bpe(captions: Iterable[str], settings: TokenizerSettings, out: Path) -> Tokenizer:
    """Train a byte-level BPE on ``captions``, read once as a stream, and write ``out/tokenizer.json``.

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
    write_checksums(out, ["tokenizer.json"])
    return Tokenizer.load(out)
