"""Sampling settings against what the judges say of them, on captions that the chain validates with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.held_out import split_store
from dalle_cli.stores.tokens import TokenReader
from quality_parts.chain import run_dalle
from quality_parts.datasets import DataSet
from quality_parts.judges import Head, Judge, Right, distances

TEMPERATURES = (0.7, 0.85, 1.0)
TOP_P = (0.9,)
"""Tried at temperature 1, since both narrow the choice of tokens."""
GUIDANCES = (1.0, 2.0, 4.0)
SAMPLES = 4
"""Number of samples of each caption."""


def sweep(run: Path, data: DataSet, judge: Judge, heads: dict[str, Head], limit: int) -> list[dict[str, Any]]:
    """Draw the first ``limit`` held-out captions of the run's store under each setting; return the judges' figures.

    These are samples of the training part, so the settings are not chosen on what the benchmark scores.
    """
    recipe, reader = open_checkpoint(run / "prior", "prior").recipe(), TokenReader(run / "tokens.zarr")
    _, held_out = split_store(reader, recipe)
    keys = reader.strings("key", held_out[:limit])
    prompts = run / "validation-captions.jsonl"
    captions = reader.strings("caption", held_out[:limit])
    lines = [json.dumps({"id": key, "caption": caption}) for key, caption in zip(keys, captions, strict=True)]
    prompts.write_text("\n".join(lines) + "\n")
    labels = {row["key"]: row["labels"] for row in data.rows(data.train)}
    real = judge.features([data.root / row["path"] for row in data.rows(data.train) if row["key"] in set(keys)])
    found = []
    for temperature, top_p, guidance in _settings():
        out = run / "sweep" / f"t{temperature}-p{top_p}-g{guidance}.jsonl"
        out.parent.mkdir(exist_ok=True)
        options = {"--temperature": temperature, "--top-p": top_p, "--guidance": guidance, "--n": SAMPLES}
        words = [str(word) for option in options.items() for word in option]
        run_dalle("sample", str(run / "prior"), "--captions", str(prompts), *words, stdout=out)
        samples = [json.loads(line) for line in out.read_text().splitlines()]
        drawn = judge.features([Path(sample["png"]) for sample in samples])
        right = {
            name: asdict(_right(head.predict(drawn), [labels[sample["id"]][name] for sample in samples]))
            for name, head in heads.items()
        }
        settings = {"temperature": temperature, "top_p": top_p, "guidance": guidance}
        found.append({**settings, "right": right, **distances(drawn, real)})
    return found


def _settings() -> list[tuple[float, float, float]]:
    tempered = [(temperature, 1.0, guidance) for temperature in TEMPERATURES for guidance in GUIDANCES]
    return tempered + [(1.0, top_p, guidance) for top_p in TOP_P for guidance in GUIDANCES]


def _right(guesses: Sequence[str], wanted: Sequence[str]) -> Right:
    """Return the share right; its error counts captions, since the samples of one are alike."""
    hits = np.array([guess == label for guess, label in zip(guesses, wanted, strict=True)]).reshape(-1, SAMPLES)
    per_caption = hits.mean(axis=1)
    return Right(float(per_caption.mean()), float(per_caption.std(ddof=1) / len(per_caption) ** 0.5), hits.size)
