"""What reranking would have chosen, had fewer samples been drawn: the best of random subsets of each caption's pool.

The pool is scored once. A subset of every size comes from one random order of the pool's samples, so that a larger
subset holds the smaller ones and sizes differ by the reranking alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator


def best_of_subsets(pool_sizes: Sequence[int], sizes: Sequence[int], seed: int, repeat: int) -> NDArray[np.int64]:
    """For each caption and size the rank (from 0) of the best of a random subset, (captions, sizes).

    ``pool_sizes`` (captions,) count each caption's samples, which are numbered best first. Rank r (from 1) of n comes
    out with probability C(n - r, k - 1) / C(n, k) at size k. ``seed`` and ``repeat`` decide the draw.
    """
    if not all(1 <= size <= min(pool_sizes) for size in sizes):
        raise ValueError(f"subsets of {sizes} of pools of {min(pool_sizes)} samples or more")
    rng = numpy_generator(seed, "pool", repeat)
    last = np.array(sizes) - 1
    chosen = np.empty((len(pool_sizes), len(sizes)), np.int64)
    for row, n in enumerate(pool_sizes):
        chosen[row] = np.minimum.accumulate(rng.permutation(n))[last]
    return chosen


def parse_pool_sizes(text: str) -> list[int]:
    """``"1,2,4,8"``, or ``"1,2,4,...,512"``, where the dots stand for doublings; ascending, each once.

    Raises:
        UserError: it is no list of counts of 1 or more.
    """
    parts = [part.strip() for part in text.split(",")]
    sizes: set[int] = set()
    refusal = UserError(f"--pool {text}: is no list of pool sizes; write e.g. 1,2,4,8 or 1,2,4,...,512")
    for before, part in pairwise(["", *parts]):
        if part == "..." and before.isdecimal() and parts[-1].isdecimal() and int(before) > 0:
            size = 2 * int(before)
            while size < int(parts[-1]):
                sizes.add(size)
                size *= 2
        elif part.isdecimal() and int(part) > 0:
            sizes.add(int(part))
        else:
            raise refusal
    return sorted(sizes)


def parse_radii(text: str) -> list[float]:
    """``"0,1,2,4,8"``: radii of the blur in pixels, ascending, each once.

    Raises:
        UserError: one is no number of 0 to 1,000.
    """
    try:
        radii = sorted({float(part) for part in text.split(",")})
    except ValueError:
        radii = [-1.0]
    if not all(0 <= radius <= 1000 for radius in radii):
        raise UserError(f"--blur {text}: is no list of radii in pixels; write e.g. 0,1,2,4,8")
    return radii
