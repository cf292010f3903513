"""How often samples show what their captions say, judged by measuring the pictures of the shapes world.

Three figures matter: a single sample (what the prior knows), the best by CLIP of a pool (what a user gets), and
whether any of the pool is right (what a perfect reranker would get). Captions with a held-out (colour, shape) pair,
which no training picture shows, are counted on their own: they need composition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.errors import UserError
from dalle_cli.shapes.oracle import detect, matches_claim
from dalle_cli.shapes.world import HELD_OUT, Claim, parse_caption

Line = dict[str, Any]
Group = Literal["seen pairs", "held-out pairs"]
GROUPS: tuple[Group, ...] = ("seen pairs", "held-out pairs")


@dataclass(frozen=True)
class Pool:
    """The samples of one caption, best first by CLIP, as lines of ``dalle rerank``."""

    prompt: str
    lines: tuple[Line, ...]

    @property
    def whole(self) -> bool:
        """Whether every sample drawn is here: ``rerank --top`` leaves gaps among the indices."""
        return max(int(line.get("index", 0)) for line in self.lines) < len(self.lines)


@dataclass(frozen=True)
class JudgedPool:
    """Which samples of a pool show what the caption says, best first."""

    pool: Pool
    group: Group
    right: tuple[bool, ...]


def group_by_caption(lines: Iterable[Line], name: str) -> list[Pool]:
    """Ranked lines gathered by caption, captions in their order, samples best first.

    A caption that was asked for twice was drawn twice alike: its samples count once.

    Raises:
        UserError: a line has no score and rank.
    """
    gathered: dict[str, dict[Any, Line]] = {}
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("score"), float | int) or not isinstance(line.get("rank"), int):
            raise UserError(f"{name}, sample {number}: has no score and rank; give the lines that dalle rerank prints")
        drawn_as = (line["store"], line["seed"], line["index"]) if {"store", "seed", "index"} <= line.keys() else number
        gathered.setdefault(line["prompt"], {}).setdefault(drawn_as, line)
    # Ranks follow unrounded scores, so they part what rounding made equal.
    return [
        Pool(prompt, tuple(sorted(own.values(), key=lambda line: (-line["score"], line["rank"]))))
        for prompt, own in gathered.items()
    ]


def claim_of(caption: str) -> Claim | None:
    """What the caption says, or None when it is not of the shapes world."""
    try:
        return parse_caption(caption)
    except ValueError:
        return None


def group_of(claim: Claim) -> Group:
    """Whether any (colour, shape) pair of the claim was kept out of training."""
    return "held-out pairs" if any((t.colour, t.shape) in HELD_OUT for t in claim.things) else "seen pairs"


def judge(ranked: Sequence[Pool], advance: Callable[[], None] | None = None) -> list[JudgedPool]:
    """Look at every picture of the pools whose captions are of the shapes world; the others are left out.

    Raises:
        UserError: a picture is missing or broken.
    """
    judged = []
    for pool in ranked:
        claim = claim_of(pool.prompt)
        if claim is not None:
            right = tuple(matches_claim(claim, detect(load_picture(line))) for line in pool.lines)
            judged.append(JudgedPool(pool, group_of(claim), right))
        if advance is not None:
            advance()
    return judged


def load_picture(line: Line) -> NDArray[np.uint8]:
    """The picture (H, W, 3) uint8 of a sample's line."""
    path = Path(line["png"])
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: the sample's picture is missing; run from the folder that dalle sample ran in, or draw it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None


@dataclass(frozen=True)
class Share:
    """A share of captions and its binomial standard error over them."""

    value: float
    prompts: int

    @property
    def error(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / self.prompts)


@dataclass(frozen=True)
class Accuracy:
    """Figures of a group of captions. Where pools were cut to their best, only ``best`` can be known."""

    prompts: int
    samples: int
    pool_size: int
    """Samples of a caption; of the smallest pool where they differ."""
    best: Share
    single: Share | None
    any_right: Share | None
    by_pool_size: dict[int, Share]


def accuracy(judged: Sequence[JudgedPool], sizes: Sequence[int] | None = None) -> Accuracy:
    """The figures of some captions, each counting alike, by pools of ``sizes`` if not of 1, 2, 4 ... samples.

    Needs at least one caption, and no size above the smallest pool's.
    """
    if not judged:
        raise ValueError("accuracy of no caption")

    def mean(shares: Iterable[float]) -> Share:
        values = list(shares)
        return Share(sum(values) / len(values), len(values))

    smallest = min(len(item.right) for item in judged)
    whole = all(item.pool.whole for item in judged)
    by_size = (pool_sizes(smallest) if sizes is None else sizes) if whole else []
    return Accuracy(
        prompts=len(judged),
        samples=sum(len(item.right) for item in judged),
        pool_size=smallest,
        best=mean(float(item.right[0]) for item in judged),
        single=mean(sum(item.right) / len(item.right) for item in judged) if whole else None,
        any_right=mean(float(any(item.right)) for item in judged) if whole else None,
        by_pool_size={k: mean(best_of_subset(item.right, k) for item in judged) for k in by_size},
    )


def accuracies(judged: Sequence[JudgedPool], sizes: Sequence[int] | None = None) -> dict[str, Accuracy]:
    """The figures of each group that has captions."""
    own = {name: [item for item in judged if item.group == name] for name in GROUPS}
    return {name: accuracy(items, sizes) for name, items in own.items() if items}


def accuracy_figures(found: Accuracy) -> dict[str, Any]:
    """As plain values, for JSON."""

    def share(value: Share | None) -> dict[str, float] | None:
        return None if value is None else {"value": round(value.value, 6), "error": round(value.error, 6)}

    return {
        "prompts": found.prompts,
        "samples": found.samples,
        "pool_size": found.pool_size,
        "single": share(found.single),
        "best": share(found.best),
        "any_right": share(found.any_right),
        "by_pool_size": {str(size): share(value) for size, value in found.by_pool_size.items()},
    }


def pool_sizes(n: int) -> list[int]:
    """1, 2, 4 ... and n itself."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def best_of_subset(right: Sequence[bool], k: int) -> float:
    """Chance that the best-ranked of a random k-subset of the n samples is right; ``right`` is best first.

    Sample r (from 1) is the best of a subset when the other k - 1 lie behind it: C(n - r, k - 1) of C(n, k) subsets.
    """
    n = len(right)
    if not 1 <= k <= n:
        raise ValueError(f"a subset of {k} of {n} samples")
    subsets = sum(math.comb(n - r, k - 1) for r, good in enumerate(right, start=1) if good)
    return subsets / math.comb(n, k)
