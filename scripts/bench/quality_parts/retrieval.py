"""A judge of captions: a CLIP trained on held-out pictures that are not drawn, and that no system has seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.clip.scorer import Scorer
from dalle_cli.clip.scoring import load_scorer
from dalle_cli.config.load import load_recipe
from dalle_cli.data.images import decode_image
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import TokenReader
from quality_parts.chain import run_dalle
from quality_parts.datasets import DataSet
from quality_parts.judges import NETWORK, Right


def train_judge(data: DataSet, recipe: Path, drawn: Sequence[dict[str, Any]]) -> Scorer:
    """Train the CLIP of ``recipe``, with another picture tower, on the held-out pictures that are not ``drawn``.

    It is trained once for each data set and number of drawn captions.
    """
    run = data.root / f"judge-{len(drawn)}"
    trained = run / "trained"
    if not trained.is_file():
        shutil.rmtree(run, ignore_errors=True)  # of a benchmark that was killed
        run.mkdir()
        keys = {row["key"] for row in drawn}
        lines = [line for line in data.held_out.read_text().splitlines() if json.loads(line)["key"] not in keys]
        rest = data.root / f"rest-{len(drawn)}.jsonl"
        rest.write_text("\n".join(lines) + "\n")
        changes = [f"run={run}", f"data.train={rest}", f"clip.model.vision={NETWORK}", "clip.training.updates=300"]
        options = [str(recipe), *(word for change in changes for word in ("--set", change))]
        run_dalle("train-tokenizer", *options)
        run_dalle("tokenize-text", *options)
        _write_empty_pictures(run / "tokens.zarr", load_recipe(recipe).grid)
        run_dalle("train-clip", *options)
        trained.touch()
    return load_scorer(str(run / "clip"), None, None, beside=run / "clip")


def share_found(judge: Scorer, pictures: Sequence[Path], captions: Sequence[str], among: int = 1) -> Right:
    """Return how often a picture's own caption is ``among`` the ones that fit it best, of all ``captions``."""
    distinct = list(dict.fromkeys(captions))
    texts = judge.text_features(distinct)
    images = judge.image_features([np.asarray(decode_image(path.read_bytes())) for path in pictures])
    nearest = (images @ texts.T).topk(min(among, len(distinct)), dim=1).indices.tolist()
    return Right.of([caption in [distinct[i] for i in row] for row, caption in zip(nearest, captions, strict=True)])


def _write_empty_pictures(store: Path, grid: int) -> None:
    """Complete a store whose image tokens nobody reads: a CLIP without hard negatives sees the pictures themselves."""
    reader = TokenReader(store)
    rows = len(reader)
    identity = {"source": reader.part("text").identity["source"], "dvae": "0" * 64, "grid": grid, "codebook_size": 2}
    with PartWriter(store, "image", identity, rows) as writer:
        keys = reader.strings("key", np.arange(rows))
        writer.append(keys, {"image": np.zeros((rows, grid, grid), np.uint16), "image_ok": np.ones(rows, np.uint8)}, {})
        writer.finish()
