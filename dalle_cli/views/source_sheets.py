"""Contact sheets of a source's pictures: examples with their captions, and pairs of near-duplicates."""

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
"""Largest number of pairs on a sheet of near-duplicates."""
CELL = 176
"""Side of a picture on a sheet, in pixels."""


def examples_sheet(source: Source, max_pixels: int) -> bytes | None:
    """Return a PNG of pictures spread evenly over the source, with their first captions; None if none can be read."""
    shown = [(_fit(image), caption) for image, caption in examples(source, EXAMPLES, max_pixels)]
    return png_bytes(captioned_grid(shown, title=source.name, cell=CELL)) if shown else None


def pairs_sheet(found: Overlap, max_pixels: int) -> bytes | None:
    """Return a PNG of near-duplicates one above the other, the least similar first; None if none can be read.

    Half of them are the least similar pairs, and half are spread evenly over the rest.
    """
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
        above.append(_fit(pair[0]))
        below.append(_fit(pair[1]))
    if not above:
        return None
    labels = ("repeats", "earlier") if found.source is found.other else ("TRAIN", "EVAL")
    return png_bytes(
        side_by_side(above, below, labels=labels, title="near-duplicates, the least similar first", cell=CELL)
    )


def _fit(image: Image.Image) -> Picture:
    """Scale the whole picture into a white square of side CELL."""
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (CELL, CELL), (255, 255, 255))
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return np.asarray(square)
