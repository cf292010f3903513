"""A tokenizer of the tests' captions, and slow references of its dropout and of a store's rows."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dalle_cli.config.schema import TokenizerSettings
from dalle_cli.randomness import stream_seed
from dalle_cli.text.bpe import Tokenizer, train_bpe
from dalle_cli.text.bpe_dropout import WIDTHS
from dalle_cli.text.ragged import Ragged
from helpers.captions import CORPUS, recipe_with

MASK = 2**64 - 1


@cache
def tokenizer() -> Tokenizer:
    """Return a tokenizer trained on the captions of CORPUS."""
    with TemporaryDirectory() as folder:
        return train_bpe(iter(CORPUS), recipe_with().tokenizer, Path(folder))


def as_lists(ragged: Ragged) -> list[list[int]]:
    """Return the sequences as lists."""
    ends = np.cumsum(ragged.counts)
    return [ragged.values[end - count : end].tolist() for end, count in zip(ends, ragged.counts, strict=True)]


def mixed(x: int) -> int:
    """Return splitmix64's finalizer of ``x``."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def skipped_pairs(stream: int, draw: int, p: float) -> int:
    """Return the number of pairs that a stream's random number ``draw`` skips, which is geometric."""
    value, count, power = mixed((stream + draw * 0x9E3779B97F4A7C15) & MASK) >> 11, 0, p
    while count < WIDTHS[-1] and value < int(power * 2.0**53):
        count, power = count + 1, power * p
    return count


def reference_dropout(words: Tokenizer, caption: str, p: float, stream: int) -> list[int]:
    """Return a caption's tokens with dropout, computed one pair at a time."""
    model = json.loads(words.backend.to_str())["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    text = words.backend.normalizer.normalize_str(caption)
    ids, begin = [], 1
    for word, _ in words.backend.pre_tokenizer.pre_tokenize_str(text):
        symbols = list(word)
        for step in range(len(word)):
            pairs = sorted((ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks)
            # A word beyond the limit is left whole.
            skipped = skipped_pairs(stream, begin + step, p) if len(word) <= WIDTHS[-1] else 0
            if skipped >= len(pairs):
                break
            i = pairs[skipped][1]
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        begin += len(word)
        ids += [model["vocab"][symbol] for symbol in symbols]
    return ids


def reference_turn(row: int, epoch: int, count: int) -> int:
    """Return which of its captions a row shows in an epoch: they take turns from one that is drawn anew each time."""
    first = mixed((mixed(row * 0x9E3779B97F4A7C15 & MASK) + epoch // count * 0x9E3779B97F4A7C15) & MASK)
    return (first + epoch) % count


def reference_epoch(captions: list[str], config: TokenizerSettings, seed: int, row: int, epoch: int) -> list[int]:
    """Return the tokens that training sees in an epoch of a row with these usable captions."""
    if not captions:
        return []
    caption = captions[reference_turn(row, epoch, len(captions))]
    if config.dropout == 0:
        return as_lists(tokenizer().encode([caption]))[0][: config.text_length]
    stream = mixed((stream_seed(seed, "bpe-dropout", epoch) + row * 0x9E3779B97F4A7C15) & MASK)
    return reference_dropout(tokenizer(), caption, config.dropout, stream)[: config.text_length]


def reference_rows(captions: list[list[str]], config: TokenizerSettings) -> list[dict[str, Any]]:
    """Return each row of a token store, encoded by itself."""
    rows = []
    for texts in captions:
        length = config.text_length
        encoded = {caption: as_lists(tokenizer().encode([caption]))[0] for caption in texts}
        usable = [c for c in texts if encoded[c] and not (config.overlong == "refuse" and len(encoded[c]) > length)]
        rows.append(
            {
                "text": encoded[usable[0]][:length] if usable else [],
                "versions": [encoded[each][:length] for each in usable],
                "caption": usable[0] if usable else (texts or [""])[0],
                "usable": usable,
                "overlong": sum(len(encoded[caption]) > length for caption in texts),
            }
        )
    return rows


def tokens_of(text: np.ndarray, length: np.ndarray) -> list[list[int]]:
    """Return each row's tokens as a list, after a check that zeros follow them."""
    assert all(not row[n:].any() for row, n in zip(text, length, strict=True))
    return [row[:n].tolist() for row, n in zip(text, length, strict=True)]
