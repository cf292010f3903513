"""The built-in worlds: pictures of one or two coloured shapes, and captions that say exactly what is in them.

Nothing has to be downloaded, and every claim of a caption can be checked on the picture (see ``oracle``). A few
(colour, shape) pairs are kept out of training, to measure whether a model composes known words in a new way. In the
world ``lattice``, edges lie on the grid of image tokens, so that a small model learns it in minutes. In the world
``free``, things may lie anywhere, on backgrounds of any light shade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 65),
    "blue": (35, 75, 215),
    "yellow": (245, 210, 25),
    "purple": (130, 40, 150),
    "orange": (245, 120, 10),
    "black": (25, 25, 30),
    "pink": (245, 95, 175),
    "brown": (120, 70, 30),
    "cyan": (45, 190, 215),
}
SHAPES = ("square", "star", "tee", "ell", "bar", "post", "circle", "triangle")
SIZES = {"small": 1 / 8, "medium": 3 / 16, "large": 1 / 4}
"""Radii as fractions of the picture's side, far enough apart that sizes are never confused."""
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(INVERSE)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "ell"),
        ("green", "bar"),
        ("blue", "post"),
        ("yellow", "square"),
        ("purple", "circle"),
        ("orange", "triangle"),
        ("black", "tee"),
        ("pink", "star"),
    }
)
"""(colour, shape) pairs that never appear in training. Those of the lattice have outlines that can be composed of the
tokens of other shapes of that colour."""

SPLITS = ("train", "seen", "heldout")

_SINGLE_SHARE = 0.2
"""Share of the scenes with a single thing."""
_MAX_RADII = 0.5
"""Exclusive upper bound of the sum of two radii, since two large things do not fit beside each other."""
_GAP = 0.03
"""Smallest distance between two things along the relation's axis."""
_SLANT = 0.3
"""Largest offset across the relation's axis, as a share of the distance along it."""


@dataclass(frozen=True)
class Kind:
    """A kind of world: its vocabulary, and where things may lie."""

    name: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    steps: int | None
    """Number of steps per side of the lattice of centres; None: centres lie anywhere."""
    shaded: bool
    """True for backgrounds of varying shade, False for white ones."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All (colour, shape) pairs."""
        return list(product(self.colours, self.shapes))


LATTICE = Kind("shapes", tuple(COLOURS)[:6], SHAPES[:6], ("small", "large"), steps=8, shaded=False)
"""The world of the quickstart: in pictures of 64 pixels, a step is as wide as a token of 8 x 8 pixels."""
FREE = Kind("free-shapes", tuple(COLOURS), SHAPES, tuple(SIZES), steps=None, shaded=True)


class Fact(NamedTuple):
    """The attributes of a thing in a caption."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """The content of a caption, the same for all phrasings; ``relation`` is "above", "left of" or None."""

    things: tuple[Fact, ...]
    relation: str | None


@dataclass(frozen=True)
class Thing:
    """One shape; ``x``, ``y`` (its centre) and ``radius`` are fractions of the picture's side."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def fact(self) -> Fact:
        return Fact(self.size, self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """One thing (relation None), or two things of which the first stands in ``relation`` to the second."""

    things: tuple[Thing, ...]
    relation: str | None

    @property
    def claim(self) -> Claim:
        return canonical([thing.fact for thing in self.things], self.relation)


def canonical(facts: list[Fact], relation: str | None) -> Claim:
    """Return the claim with its relation turned to "above" or "left of"."""
    if relation in ("below", "right of"):
        return Claim(tuple(reversed(facts)), INVERSE[relation])
    return Claim(tuple(facts), relation)


def counter_rng(seed: int, what: str, split: str, index: int) -> np.random.Generator:
    """Return a generator that depends on (seed, what, split, index) only, so that any row can be made alone."""
    words = [int.from_bytes(what.encode(), "little"), SPLITS.index(split), index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=words)))


def random_scene(seed: int, split: str, index: int, kind: Kind = LATTICE) -> Scene:
    """Return the scene of a row: "train" and "seen" have no held-out pair, "heldout" has at least one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    rng = counter_rng(seed, "scene", split, index)
    pairs = _draw_pairs(rng, kind, count=1 if rng.random() < _SINGLE_SHARE else 2, heldout=split == "heldout")
    combinations = [
        sizes for sizes in product(kind.sizes, repeat=len(pairs)) if sum(SIZES[size] for size in sizes) < _MAX_RADII
    ]
    sizes = combinations[rng.integers(len(combinations))]
    radii = [SIZES[size] for size in sizes]
    if len(pairs) == 1:
        relation = None
        centres = [_anywhere(rng, radii[0]) if kind.steps is None else _on_lattice(rng, radii[0], kind.steps)]
    else:
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        centres = _place(rng, radii, relation, kind.steps)
    things = tuple(
        Thing(colour, shape, size, x, y, radius)
        for (colour, shape), size, (x, y), radius in zip(pairs, sizes, centres, radii, strict=True)
    )
    return Scene(things, relation)


def _draw_pairs(rng: np.random.Generator, kind: Kind, count: int, heldout: bool) -> list[tuple[str, str]]:
    """Draw ``count`` different (colour, shape) pairs; with ``heldout`` at least one is a held-out pair."""
    held, seen = (select_pairs(kind, held_out=wanted) for wanted in (True, False))
    if not heldout:
        return [seen[i] for i in rng.choice(len(seen), count, replace=False)]
    first = held[rng.integers(len(held))]
    others = [pair for pair in kind.pairs if pair != first]
    pairs = [first, *(others[i] for i in rng.choice(len(others), count - 1, replace=False))]
    return pairs[::-1] if rng.random() < 0.5 else pairs


@lru_cache
def select_pairs(kind: Kind, *, held_out: bool) -> tuple[tuple[str, str], ...]:
    """Return the (colour, shape) pairs of a world that are, or are not, held out of training."""
    return tuple(pair for pair in kind.pairs if (pair in HELD_OUT) == held_out)


def _lattice(radius: float, steps: int) -> range:
    """Return the lattice steps at which a thing lies wholly inside the picture."""
    first = math.ceil(radius * steps)
    return range(first, steps - first + 1)


def _on_lattice(rng: np.random.Generator, radius: float, steps: int) -> tuple[float, float]:
    places = _lattice(radius, steps)
    return places[rng.integers(len(places))] / steps, places[rng.integers(len(places))] / steps


def _anywhere(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    return rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)


def _place(rng: np.random.Generator, radii: list[float], relation: str, steps: int | None) -> list[tuple[float, float]]:
    """Draw the centres of two things, apart along the relation's axis and nearly level across it."""
    # Place the things as for "above" or "left of", then swap.
    a, b = radii if relation in ("above", "left of") else radii[::-1]
    along = _apart_anywhere(rng, a, b) if steps is None else _apart_on_lattice(rng, a, b, steps)
    if relation in ("below", "right of"):
        along.reverse()
    return [(across, main) for main, across in along] if relation in ("above", "below") else along


def _apart_on_lattice(rng: np.random.Generator, a: float, b: float, steps: int) -> list[tuple[float, float]]:
    """Return (along, across) of the first and the second of two things of radii ``a`` and ``b``."""
    apart = (a + b + _GAP) * steps
    pairs = [(i, j) for i in _lattice(a, steps) for j in _lattice(b, steps) if j - i >= apart]
    start, end = pairs[rng.integers(len(pairs))]
    level = [(i, j) for i in _lattice(a, steps) for j in _lattice(b, steps) if abs(i - j) <= _SLANT * (end - start)]
    across_a, across_b = level[rng.integers(len(level))]
    return [(start / steps, across_a / steps), (end / steps, across_b / steps)]


def _apart_anywhere(rng: np.random.Generator, a: float, b: float) -> list[tuple[float, float]]:
    apart = a + b + _GAP
    start = rng.uniform(a, 1 - b - apart)
    end = rng.uniform(start + apart, 1 - b)
    # The larger thing has the narrower range, so it is placed first.
    large, small = max(a, b), min(a, b)
    slack = _SLANT * (end - start)
    across_large = rng.uniform(large, 1 - large)
    across_small = rng.uniform(max(small, across_large - slack), min(1 - small, across_large + slack))
    across_a, across_b = (across_large, across_small) if a >= b else (across_small, across_large)
    return [(start, across_a), (end, across_b)]
