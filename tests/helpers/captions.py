"""Sources of captions without pictures, and small shards, for the tests of text and for the processes they start.

Run as a program, it makes the text part of a store, with dropout and several captions a picture:

    python captions.py ROWS STORE TOKENIZER [train]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from dalle_cli.config.schema import Recipe, TokenizerSettings
from dalle_cli.data.source import BadSample
from dalle_cli.stores import token_writer, tokens
from dalle_cli.text import tokenize
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.tokenize import tokenize_source, train_tokenizer

WORDS = ["a", "the", "red", "green", "tiny", "huge", "triangle", "triangles", "square", "circle", "circles", "above"]
CORPUS = [" ".join(random.Random(n).choices(WORDS, k=1 + n % 9)) for n in range(400)]


class Captions:
    """A source of captions; None is a sample that cannot be read."""

    name = format = identity = "captions"
    skipped: tuple[()] = ()

    def __init__(self, captions: list[list[str] | None]) -> None:
        self.all = captions

    def __len__(self) -> int:
        return len(self.all)

    def key(self, i: int) -> str:
        return f"key-{i}"

    def captions(self, i: int) -> list[str]:
        captions = self.all[i]
        if captions is None:
            raise BadSample("no caption")
        return captions


def uneven(rows: int) -> Captions:
    """Return a source with one caption a picture at first, then more and more, up to ten, and sometimes none."""
    picked: list[list[str] | None] = []
    for row in range(rows):
        rng = random.Random(row)
        count = 1 if row < 5 else 1 + rng.randrange(min(10, 1 + row // 4))
        picked.append(None if row % 6 == 3 else rng.sample(CORPUS, count))
    return Captions(picked)


def recipe_with(**changes: Any) -> Recipe:
    return Recipe(name="t", seed=3, tokenizer=TokenizerSettings(**{"vocab_size": 290, "text_length": 9, **changes}))


@contextmanager
def shards_of(rows: int) -> Iterator[None]:
    with (
        mock.patch.multiple(tokens, ROWS_PER_BLOCK=rows, ROWS_PER_CHUNK=rows // 2),
        mock.patch.multiple(token_writer, ROWS_PER_BLOCK=rows, ROWS_PER_CHUNK=rows // 2),
        mock.patch.multiple(tokenize, ROWS_PER_BLOCK=rows, BLOCKS_AT_ONCE=2),
    ):
        yield


if __name__ == "__main__":
    source, recipe, folder = uneven(int(sys.argv[1])), recipe_with(dropout=0.3), Path(sys.argv[3])
    words = train_tokenizer(recipe, source, folder) if "train" in sys.argv else Tokenizer.load(folder)
    with shards_of(4):
        tokenize_source(recipe, source, words, Path(sys.argv[2]))
