#!/usr/bin/env python3
"""Measure how many altered copies of pictures `dalle overlap` finds by hashes and by a network's features.

    .venv/bin/python scripts/studies/overlap.py DATA/grocery --count 300
    .venv/bin/python scripts/studies/overlap.py DATA/grocery --clip RUN/clip

The first --count pictures of the source are the originals, the next ones distractors. Each original is altered in each
way, and a copy counts as found if its match is its original. "Distractors" is the share of the distractors that match
an original, which they should not, unless the source repeats pictures.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageOps
from rich.console import Console

from dalle_cli.data.images import decode_image
from dalle_cli.data.open_source import open_source
from dalle_cli.data.overlap.search import Comparison, Overlap, find_overlap
from dalle_cli.fid.features import named_features
from dalle_cli.fid.nearest import find_nearest
from dalle_cli.views.tables import grid_table

MAX_PIXELS = 10**8
THRESHOLDS = (0.8, 0.85, 0.9, 0.95)
"""Similarities of features."""
Alteration = Callable[[Image.Image], Image.Image]


def crop(share: float) -> Alteration:
    """Return a function that cuts off ``share`` of the width and of the height, mostly at the left and the top."""

    def cut(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        left, top = round(0.7 * share * width), round(0.7 * share * height)
        return picture.crop((left, top, left + round((1 - share) * width), top + round((1 - share) * height)))

    return cut


def jpeg(picture: Image.Image) -> Image.Image:
    """Re-encode as JPEG of quality 40, at half the size."""
    buffer = io.BytesIO()
    picture.resize((picture.width // 2, picture.height // 2)).save(buffer, "JPEG", quality=40)
    return Image.open(buffer)


ALTERATIONS: dict[str, Alteration] = {
    "JPEG, half the size": jpeg,
    "cropped by 5 %": crop(0.05),
    "cropped by 10 %": crop(0.1),
    "cropped by 20 %": crop(0.2),
    "cropped by 40 %": crop(0.4),
    "mirrored": ImageOps.mirror,
    "half the saturation": lambda picture: ImageEnhance.Color(picture).enhance(0.5),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "brighter by half": lambda picture: ImageEnhance.Brightness(picture).enhance(1.5),
}


def write(folder: Path, pictures: dict[str, Image.Image]) -> Path:
    """Write pictures, each with a caption, into a new folder."""
    folder.mkdir()
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a picture")
    return folder


def own_matches(found: Overlap, threshold: float) -> float:
    """Return the share of pictures whose match is the one of their own name."""
    same = [m for m in found.matches if found.source.key(m.row) == found.other.key(m.other)]
    return sum(m.similarity >= threshold for m in same) / len(found.source)


def any_match(found: Overlap, threshold: float) -> float:
    """Return the share of pictures that match any."""
    return sum(m.similarity >= threshold for m in found.matches) / len(found.source)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="captioned pictures")
    parser.add_argument("--count", type=int, default=300, help="number of originals, and of distractors")
    parser.add_argument("--features", default="tf_efficientnet_lite0", help="network of timm")
    parser.add_argument("--clip", help="a CLIP in its place")
    options = parser.parse_args()
    source, count = open_source(options.source), options.count
    features = named_features(options.clip, None, options.features, [], torch.device("cpu"))

    def pictures(rows: range) -> dict[str, Image.Image]:
        return {f"{row:05d}": decode_image(source.image_bytes(row), MAX_PIXELS) for row in rows}

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        chosen = pictures(range(count))
        originals = open_source(str(write(folder / "originals", chosen)))
        rows = []
        for place, (name, alter) in enumerate({**ALTERATIONS, "distractors": None}.items()):
            altered = pictures(range(count, 2 * count)) if alter is None else {k: alter(p) for k, p in chosen.items()}
            copies = open_source(str(write(folder / str(place), altered)))
            hashed = find_overlap(copies, originals, folder / "cache", Comparison(MAX_PIXELS, workers=2))
            near = find_nearest(copies, originals, features, folder / "cache", max_pixels=MAX_PIXELS, threshold=0.0)
            share = any_match if alter is None else own_matches
            shares = [share(hashed, 0.0), *(share(near, threshold) for threshold in THRESHOLDS)]
            rows.append([name, *(f"{100 * value:.1f}" for value in shares)])
    columns = ["% found", "hashes", *(f"features {threshold}" for threshold in THRESHOLDS)]
    Console().print(grid_table(f"{features.name}, {count} pictures each", columns, rows, right=range(1, len(columns))))


if __name__ == "__main__":
    main()
