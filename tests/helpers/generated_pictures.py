"""Folders and sample lines of tiny pictures, as systems to measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.fid.systems import System, open_system

SIDE = 8


def noise(seed: int, side: int = SIDE) -> Image.Image:
    rng = np.random.default_rng(seed)
    shade = rng.integers(0, 200, 3)
    return Image.fromarray((rng.integers(0, 56, (side, side, 3)) + shade).astype(np.uint8))


def write_folder(folder: Path, count: int, first_seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        noise(first_seed + i).save(folder / f"{i:03d}.png")
    return folder


def write_lines(folder: Path, prompts: Sequence[str], n: int, *, scores: bool = True, first_seed: int = 1000) -> Path:
    """Write ``n`` samples of each prompt, the best last, into a folder of their own; return the file of their lines."""
    folder.mkdir(parents=True)
    lines = []
    for p, prompt in enumerate(prompts):
        for i in range(n):
            file = folder / f"{p}-{i}.png"
            noise(first_seed + p * n + i).save(file)
            line: dict[str, Any] = {"prompt": prompt, "index": i, "png": str(file)}
            lines.append(line | ({"score": i / n, "rank": n - i, "scorer": "s"} if scores else {}))
    manifest = folder / "lines.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def write_coco(root: Path, split: str = "val2014", images: int = 4) -> None:
    """Write COCO's captions, two a picture, and its pictures."""
    (root / "annotations").mkdir(parents=True)
    write_folder(root / split, images)
    captions = {
        "images": [{"id": 10 + i, "file_name": f"{i:03d}.png"} for i in range(images)],
        "annotations": [
            {"id": 100 + 2 * i + j, "image_id": 10 + i, "caption": f" caption {i} {j} "}
            for i in range(images)
            for j in range(2)
        ],
    }
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(captions))


def system(name: str, spec: Path, captions: dict[str, str] | None = None, limit: int | None = None) -> System:
    return open_system(name, str(spec), SIDE, captions, limit, 0)
