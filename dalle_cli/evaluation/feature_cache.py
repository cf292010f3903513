"""Features of pictures, kept by content: what was measured once, by any command, is not measured again.

Pictures are measured in chunks, each kept in a file named by the hash of all that its features depend on. So a killed
job goes on at the chunk where it stopped, and a set that has grown at its end is measured only there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dalle_cli.evaluation.features import Extracted, Features
from dalle_cli.evaluation.pictures import Blurred, Pictures, SomePictures, Survey
from dalle_cli.progress import Progress
from dalle_cli.stores.files import write_atomically

FORMAT = 1
CHUNK = 1024
"""Pictures measured and kept together."""


def default_cache() -> Path:
    """``dalle/features`` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle" / "features"


def cached_features(
    pictures: Pictures,
    found: Survey,
    features: Features,
    cache: Path,
    *,
    blur: float = 0,
    bar: Progress | None = None,
) -> Extracted:
    """Features of all pictures under a Gaussian ``blur``, from the folder ``cache`` where they are in it.

    Raises:
        UserError: a picture is broken, or the cache may not be written.
    """
    chunks = []
    for start in range(0, len(pictures), CHUNK):
        rows = range(start, min(start + CHUNK, len(pictures)))
        file = cache / f"{_key(features, pictures.image_size, blur, found.digests[rows.start : rows.stop])}.safetensors"
        chunk = _read(file, len(rows), features)
        if chunk is None:
            chunk = features.extract(
                Blurred(SomePictures(pictures, rows), blur), workers=features.device.type == "cuda"
            )
            _write(file, chunk)
        chunks.append(chunk)
        if bar is not None:
            bar.advance(len(rows))
    logits = [chunk.logits for chunk in chunks if chunk.logits is not None]
    return Extracted(torch.cat([chunk.vectors for chunk in chunks]), torch.cat(logits) if logits else None)


def _key(features: Features, image_size: int, blur: float, digests: list[str]) -> str:
    what = [FORMAT, features.identity, image_size, float(blur), digests]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(file: Path, count: int, features: Features) -> Extracted | None:
    """None where there is no such file, or it is damaged: features can be had again."""
    try:
        tensors = load(file.read_bytes())
        found = Extracted(tensors["vectors"], tensors.get("logits"))
    except (OSError, SafetensorError, KeyError):
        return None
    return found if len(found) == count and (found.logits is None) == (features.logits is None) else None


def _write(file: Path, chunk: Extracted) -> None:
    tensors = {"vectors": chunk.vectors} | ({} if chunk.logits is None else {"logits": chunk.logits})
    write_atomically(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
