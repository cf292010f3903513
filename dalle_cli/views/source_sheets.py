"""Pictures of a source for people: examples with their captions, and near-duplicates side by side."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.overlap.search import Overlap
from dalle_cli.data.scan import examples
from dalle_cli.data.source import BadSample, Source
from dalle_cli.views.contact_sheet import Picture, captioned_grid, png_bytes, side_by_side

EXAMPLES = 25
PAIRS = 32
CELL = 176


def examples_sheet(source: Source, max_pixels: int) -> bytes | None:
    """PNG of whole pictures, spread evenly over the source, with their first captions; None when none can be read."""
    shown = [(_fitted(image), caption) for image, caption in examples(source, EXAMPLES, max_pixels)]
    return png_bytes(captioned_grid(shown, title=source.name, cell=CELL)) if shown else None


def pairs_sheet(found: Overlap, max_pixels: int) -> bytes | None:
    """PNG of near-duplicates, one above the other: half of them the least similar, the others spread over the rest."""
    order = sorted(found.matches, key=lambda match: match.similarity)
    rest = order[PAIRS // 2 :]
    spread = sorted({place * len(rest) // (PAIRS // 2) for place in range(PAIRS // 2)}) if rest else []
    above, below = [], []
    for match in [*order[: PAIRS // 2], *(rest[place] for place in spread)]:
        try:
            one, two = found.source.image_bytes(match.row), found.other.image_bytes(match.other)
            pair = decode_image(one, max_pixels), decode_image(two, max_pixels)
        except (BadSample, BadImage):
            continue
        above.append(_fitted(pair[0]))
        below.append(_fitted(pair[1]))
    if not above:
        return None
    labels = ("repeats", "earlier") if found.source is found.other else ("TRAIN", "EVAL")
    return png_bytes(
        side_by_side(above, below, labels=labels, title="near-duplicates, the least similar first", cell=CELL)
    )


def _fitted(image: Image.Image) -> Picture:
    """The whole picture in a white square of CELL pixels."""
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (CELL, CELL), (255, 255, 255))
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return np.asarray(square)
