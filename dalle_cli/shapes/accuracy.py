"""The share of samples that show what their captions say, judged by the oracle of the shapes world.

There are three figures: the share of single samples that are right (the prior alone), the share of pools whose best
sample by CLIP is right (the result for a user), and the share of pools with any right sample (a perfect reranker).
Captions with a held-out (colour, shape) pair, which no training picture shows, are counted apart, since they require
composition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dalle_cli.data.images import read_picture
from dalle_cli.data.sample_lines import SampleLine
from dalle_cli.data.sample_table import SampleTable, has_rank, has_score
from dalle_cli.data.workers import available_cores, map_blocks, split_blocks
from dalle_cli.errors import UserError
from dalle_cli.shapes.oracle import detect, matches_claim
from dalle_cli.shapes.scene import HELD_OUT, Claim
from dalle_cli.shapes.world import parse_caption

Group = Literal["seen pairs", "held-out pairs"]
GROUPS: tuple[Group, ...] = ("seen pairs", "held-out pairs")
BLOCK_POOLS = 4
"""Number of captions that a process judges at a time."""


@dataclass(frozen=True)
class Pool:
    """The samples of one caption, best first by CLIP."""

    prompt: str
    lines: Sequence[SampleLine]

    @property
    def whole(self) -> bool:
        """True if no drawn sample is missing; ``rerank --top`` leaves gaps among the indices."""
        indices = (line["index"] for line in self.lines if isinstance(line.get("index"), int))
        return max(indices, default=0) < len(self.lines)


@dataclass(frozen=True)
class JudgedPool:
    """A pool and, for each sample, whether it shows what the caption says."""

    pool: Pool
    group: Group
    right: tuple[bool, ...]


def group_by_caption(lines: Iterable[SampleLine], name: str) -> list[Pool]:
    """Group lines of ``dalle rerank`` by caption, in the order of the captions' first lines, samples best first.

    A repeated caption's samples count once; see ``SampleTable.best_first``. ``name`` is the file's name in error
    messages.

    Raises:
        UserError: a line has no score and rank.
    """
    table = SampleTable()
    for number, line in enumerate(lines, start=1):
        if not has_score(line) or not has_rank(line):
            raise UserError(f"{name}, sample {number}: has no score and rank; give the lines that dalle rerank prints")
        table.append(line)
    return [Pool(prompt, table.lines(table.best_first(rows))) for prompt, rows in table.grouped("prompt", str).items()]


def claim_of(caption: str) -> Claim | None:
    """Parse a caption; return None if it is not one of the shapes world."""
    try:
        return parse_caption(caption)
    except ValueError:
        return None


def group_of(claim: Claim) -> Group:
    """Return "held-out pairs" if the claim has any held-out (colour, shape) pair, else "seen pairs"."""
    return "held-out pairs" if any((t.colour, t.shape) in HELD_OUT for t in claim.things) else "seen pairs"


def judge(ranked: Sequence[Pool], advance: Callable[[], None] | None = None) -> list[JudgedPool]:
    """Judge every picture of the pools whose captions are of the shapes world, on all cores; leave other pools out.

    Raises:
        UserError: a picture is missing or broken.
    """
    judged = []
    blocks = split_blocks(range(len(ranked)), BLOCK_POOLS)
    for block, found in zip(blocks, map_blocks(partial(_judgements, ranked), blocks, available_cores()), strict=True):
        for i, judgement in zip(block, found, strict=True):
            if judgement is not None:
                judged.append(JudgedPool(ranked[i], *judgement))
            if advance is not None:
                advance()
    return judged


def _judgements(ranked: Sequence[Pool], block: range) -> list[tuple[Group, tuple[bool, ...]] | None]:
    """Return the group of each pool in ``block``, and which samples are right; None for a pool without a claim."""
    found: list[tuple[Group, tuple[bool, ...]] | None] = []
    for pool in (ranked[i] for i in block):
        claim = claim_of(pool.prompt)
        right = () if claim is None else tuple(shows(claim, load_picture(line)) for line in pool.lines)
        found.append(None if claim is None else (group_of(claim), right))
    return found


def shows(claim: Claim, picture: NDArray[np.uint8]) -> bool:
    """Return whether the oracle finds exactly the claim in a picture (H, W, 3)."""
    return matches_claim(claim, detect(picture))


def load_picture(line: SampleLine) -> NDArray[np.uint8]:
    """Read the picture (H, W, 3) uint8 of a sample's line; raise UserError if it is missing or broken."""
    return read_picture(Path(line["png"]), "run from the folder that dalle sample ran in, or draw it again")


@dataclass(frozen=True)
class Share:
    """A mean share over captions, with its binomial standard error."""

    value: Annotated[float, Field(ge=0, le=1)]
    prompts: Annotated[int, Field(ge=1)]

    @property
    def error(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / self.prompts)


@dataclass(frozen=True)
class Accuracy:
    """Figures of a group of captions; only ``best`` is known where ``rerank --top`` cut pools to their best."""

    prompts: int
    samples: int
    pool_size: int
    """Number of samples of a caption, or the smallest number if captions differ."""
    best: Share
    """Pools whose best sample by CLIP is right."""
    single: Share | None
    """Single samples that are right, averaged per caption first."""
    any_right: Share | None
    """Pools in which any sample is right."""
    by_pool_size: dict[int, Share]
    """``best`` of random subsets of a pool, by the subset's size."""


def accuracy(judged: Sequence[JudgedPool], sizes: Sequence[int] | None = None) -> Accuracy:
    """Compute the figures of at least one pool; all captions have the same weight.

    ``sizes`` are those of ``by_pool_size``, none above the smallest pool's; 1, 2, 4 ... by default.
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
    """Compute the figures of each group that has captions."""
    by_group = {name: [item for item in judged if item.group == name] for name in GROUPS}
    return {name: accuracy(items, sizes) for name, items in by_group.items() if items}


def accuracy_figures(found: Accuracy) -> dict[str, Any]:
    """Return the figures as plain values for JSON."""

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
    """Return 1, 2, 4 ... and n itself."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def best_of_subset(right: Sequence[bool], k: int) -> float:
    """Return the probability that the best of a random k-subset of n samples is right; ``right`` is best first.

    Sample r (from 1) is the best of C(n - r, k - 1) of the C(n, k) subsets: the other k - 1 samples rank below it.
    """
    n = len(right)
    if not 1 <= k <= n:
        raise ValueError(f"a subset of {k} of {n} samples")
    subsets = sum(math.comb(n - r, k - 1) for r, good in enumerate(right, start=1) if good)
    return subsets / math.comb(n, k)
