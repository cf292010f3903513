"""A token store of random values, for tests that need nothing else of the chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dalle_cli.stores.token_writer import PartWriter


def write_tokens(path: Path, rows: int, text_length: int, vocab_size: int, grid: int, codebook_size: int) -> Path:
    """Write random captions and images of ``rows`` samples; each image repeats the first token of its caption."""
    rng = np.random.default_rng(0)
    keys = [f"{row:05d}" for row in range(rows)]
    text = rng.integers(vocab_size, size=(rows, text_length)).astype(np.uint16)
    image = np.broadcast_to(text[:, :1, None] % codebook_size, (rows, grid, grid)).astype(np.uint16)
    identity: dict[str, object] = {"tokenizer": "t" * 64, "text_length": text_length, "vocab_size": vocab_size}
    lengths = np.full(rows, text_length, np.uint16)
    with PartWriter(path, "text", {"source": "s", "source_name": "s", **identity}, rows) as writer:
        writer.append(keys, {"text": text, "text_length": lengths, "caption": np.array(["x"] * rows, object)}, {})
        writer.finish()
    identity = {"dvae": "d" * 64, "grid": grid, "codebook_size": codebook_size}
    with PartWriter(path, "image", {"source": "s", "source_name": "s", **identity}, rows) as writer:
        writer.append(keys, {"image": image, "image_ok": np.ones(rows, np.uint8)}, {})
        writer.finish()
    return path
