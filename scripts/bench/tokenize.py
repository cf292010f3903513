#!/usr/bin/env python3
"""Speed of `dalle tokenize-text` against bare `encode_batch` of the tokenizers library on the same captions.

    .venv/bin/python scripts/bench/tokenize.py --captions 200000 --rounds 5 --json

Each round runs both by turns, and tokenize-text with BPE dropout besides; the figures are medians. A ratio of 1 is the
library's speed: of wall time (which also shows what runs beside it on the machine) and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np

from dalle_cli.config.schema import Recipe, TokenizerSettings
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.tokenize import tokenize_source

BATCH = 4096


def synthetic_captions(n: int, seed: int) -> list[str]:
    """``n`` captions of 6 to 15 words out of 60,000 made of syllables, whose frequencies follow Zipf's law."""
    rng = np.random.default_rng(seed)
    onsets, vowels = [*"bcdfghjklmnprstvwz", "ch", "fr", "pl", "st", "tr"], [*"aeiou", "ai", "ee", "ou"]
    syllables = ["".join(parts) for parts in product(onsets, vowels, ["", "n", "r", "s", "t", "ng", "ck", "ing"])]
    size = 60_000
    counts = np.where(np.arange(size) < 200, 1, rng.integers(1, 4, size))
    parts = np.array(syllables, dtype=object)[rng.integers(len(syllables), size=int(counts.sum()))]
    words = np.array(["".join(word) for word in np.split(parts, np.cumsum(counts)[:-1])], dtype=object)
    frequency = 1 / (np.arange(size) + 2.7)
    lengths = rng.integers(6, 16, n)
    drawn = words[rng.choice(size, int(lengths.sum()), p=frequency / frequency.sum())]
    return [" ".join(caption) for caption in np.split(drawn, np.cumsum(lengths)[:-1])]


class Captions:
    """A source of captions without pictures."""

    name, format, skipped = "synthetic", "synthetic", ()

    def __init__(self, captions: list[str]) -> None:
        self._captions = captions

    def __len__(self) -> int:
        return len(self._captions)

    def key(self, i: int) -> str:
        return f"{i:09d}"

    def captions(self, i: int) -> list[str]:
        return [self._captions[i]]


def measure(work: Callable[[], object]) -> dict[str, float]:
    """Time ``work`` once, in seconds of wall clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main() -> None:
    """Parse the command line, measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout-epochs", type=int, default=1, help="versions of each caption with dropout 0.1")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()

    captions = synthetic_captions(options.captions, seed=0)
    whole = Recipe(name="bench", tokenizer=TokenizerSettings(dropout=0.0))
    dropped = Recipe(name="bench", tokenizer=TokenizerSettings(dropout=0.1, dropout_epochs=options.dropout_epochs))
    runs: dict[str, list[dict[str, float]]] = {"encode_batch": [], "tokenize-text": [], "with dropout": []}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_bpe(iter(captions), whole.tokenizer, Path(folder))

        def bare() -> None:
            for start in range(0, len(captions), BATCH):
                tokenizer.backend.encode_batch(captions[start : start + BATCH], add_special_tokens=False)

        def ours(recipe: Recipe) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as store:
                tokenize_source(recipe, Captions(captions), tokenizer, Path(store) / "tokens.zarr")

        bare()
        for _ in range(options.rounds):
            runs["encode_batch"].append(measure(bare))
            runs["tokenize-text"].append(measure(lambda: ours(whole)))
            runs["with dropout"].append(measure(lambda: ours(dropped)))

    median = {
        name: {kind: statistics.median(run[kind] for run in each) for kind in ("wall", "cpu")}
        for name, each in runs.items()
    }
    base = median["encode_batch"]
    found = {
        "captions": len(captions),
        "rounds": options.rounds,
        "cores": os.cpu_count(),
        "dropout_epochs": options.dropout_epochs,
        "runs": {
            name: {
                "captions_per_second": len(captions) / times["wall"],
                "cpu_microseconds_a_caption": times["cpu"] / len(captions) * 1e6,
                "speed_ratio": base["wall"] / times["wall"],
                "cpu_ratio": base["cpu"] / times["cpu"],
            }
            for name, times in median.items()
        },
    }
    if options.json:
        print(json.dumps(found))
        return
    print(f"{len(captions)} captions, {os.cpu_count()} cores, medians of {options.rounds} rounds")
    print(f"{'':14} {'captions/s':>11} {'CPU us each':>12} {'speed ratio':>12} {'CPU ratio':>10}")
    for name, run in found["runs"].items():
        speed, cpu = run["captions_per_second"], run["cpu_microseconds_a_caption"]
        print(f"{name:14} {speed:11.0f} {cpu:12.2f} {run['speed_ratio']:12.2f} {run['cpu_ratio']:10.2f}")


if __name__ == "__main__":
    main()
