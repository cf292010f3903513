"""Contact sheet of ranked samples: for each caption the best by CLIP, then others in the order drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from dalle_cli.shapes.accuracy import Pool, claim_of, group_of, load_picture
from dalle_cli.views.contact_sheet import Picture, Row, contact_sheet

OTHER_SAMPLES = 7
CELL = 128


def sample_sheet(ranked: Sequence[Pool], title: str, true_pictures: Mapping[str, Picture] | None = None) -> Image.Image:
    """Draw a row for each caption: its best sample, framed, then others in the order in which they were drawn.

    The others are not chosen by score, so they show what a single sample looks like. If ``true_pictures`` has any
    picture, each row's true picture (or an empty cell) comes before the others.
    """
    rows = []
    for pool in ranked:
        claim = claim_of(pool.prompt)
        best = load_picture(pool.lines[0])
        drawn = sorted(pool.lines[1:], key=lambda line: int(line.get("index", 0)))
        others = [load_picture(line) for line in drawn[:OTHER_SAMPLES]]
        if true_pictures:
            others.insert(0, true_pictures.get(pool.prompt, np.full_like(best, 255)))
        held_out = claim is not None and group_of(claim) == "held-out pairs"
        rows.append(Row(pool.prompt, best, others, tag="held-out pair" if held_out else None))
    others_label = "a true picture, then other samples as drawn" if true_pictures else "other samples, as drawn"
    return contact_sheet(rows, title=title, others_label=others_label, cell=CELL)
