"""The built-in world: pictures of one or two coloured shapes, and captions that say exactly what is in them.

Nothing has to be downloaded, and every claim of a caption can be checked on the picture (see ``oracle``). A few
(colour, shape) pairs are kept out of training, to measure whether a model composes known words in a new way.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dalle_cli.shapes.writer import Row, World, WrittenWorld, write_world

FORMAT_VERSION = 2
"""Version of the world, to be raised when the same seed gives other bytes."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 65),
    "blue": (35, 75, 215),
    "yellow": (245, 210, 25),
    "purple": (130, 40, 150),
    "orange": (245, 120, 10),
}
BACKGROUND = (255, 255, 255)
SHAPES = ("square", "star", "tee", "ell", "bar", "post")
SIZES = {"small": 1 / 8, "large": 1 / 4}
"""Radii as fractions of the picture's side, far enough apart that sizes are never confused."""
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(INVERSE)

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "ell"),
        ("green", "bar"),
        ("blue", "post"),
        ("yellow", "square"),
    }
)
"""(colour, shape) pairs that never appear in training, but whose outlines can be composed of the tokens of other shapes
of that colour."""
_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_HELD = tuple(pair for pair in _PAIRS if pair in HELD_OUT)
_FREE = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)

SPLITS = ("train", "seen", "heldout")

_SINGLE_SHARE = 0.2
"""Share of the scenes with a single thing."""
_LATTICE = 8
"""Number of steps per side of the lattice of centres, which lets a small model learn the world in minutes. At 64 pixels
a step is the width of an image token."""
_MAX_RADII = 0.5
"""Exclusive upper bound of the sum of two radii, since two large things do not fit beside each other."""
_GAP = 0.03
"""Smallest distance between two things along the relation's axis."""
_SLANT = 0.3
"""Largest offset across the relation's axis, as a share of the distance along it."""
_SUPERSAMPLE = 4
"""Number of sample points per pixel along each axis."""


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
        return _canonical([thing.fact for thing in self.things], self.relation)


def _canonical(facts: list[Fact], relation: str | None) -> Claim:
    """Return the claim with its relation turned to "above" or "left of"."""
    if relation in ("below", "right of"):
        return Claim(tuple(reversed(facts)), INVERSE[relation])
    return Claim(tuple(facts), relation)


# --- random scenes


def counter_rng(seed: int, what: str, split: str, index: int) -> np.random.Generator:
    """Return a generator that depends on (seed, what, split, index) only, so that any row can be made alone."""
    words = [int.from_bytes(what.encode(), "little"), SPLITS.index(split), index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=words)))


def random_scene(seed: int, split: str, index: int) -> Scene:
    """Return the scene of a row: "train" and "seen" have no held-out pair, "heldout" has at least one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    rng = counter_rng(seed, "scene", split, index)
    pairs = _draw_pairs(rng, count=1 if rng.random() < _SINGLE_SHARE else 2, heldout=split == "heldout")
    combinations = [
        sizes for sizes in product(SIZES, repeat=len(pairs)) if sum(SIZES[size] for size in sizes) < _MAX_RADII
    ]
    sizes = combinations[rng.integers(len(combinations))]
    radii = [SIZES[size] for size in sizes]
    if len(pairs) == 1:
        relation = None
        places = _lattice(radii[0])
        centres = [(places[rng.integers(len(places))] / _LATTICE, places[rng.integers(len(places))] / _LATTICE)]
    else:
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        centres = _place(rng, radii, relation)
    things = tuple(
        Thing(colour, shape, size, x, y, radius)
        for (colour, shape), size, (x, y), radius in zip(pairs, sizes, centres, radii, strict=True)
    )
    return Scene(things, relation)


def _draw_pairs(rng: np.random.Generator, count: int, heldout: bool) -> list[tuple[str, str]]:
    """Draw ``count`` different (colour, shape) pairs; with ``heldout`` at least one is a held-out pair."""
    if not heldout:
        return [_FREE[i] for i in rng.choice(len(_FREE), count, replace=False)]
    first = _HELD[rng.integers(len(_HELD))]
    others = [pair for pair in _PAIRS if pair != first]
    pairs = [first, *(others[i] for i in rng.choice(len(others), count - 1, replace=False))]
    return pairs[::-1] if rng.random() < 0.5 else pairs


def _lattice(radius: float) -> range:
    """Return the lattice steps at which a thing lies wholly inside the picture."""
    first = math.ceil(radius * _LATTICE)
    return range(first, _LATTICE - first + 1)


def _place(rng: np.random.Generator, radii: list[float], relation: str) -> list[tuple[float, float]]:
    """Draw the centres of two things, apart along the relation's axis and nearly level across it."""
    # Place the things as for "above" or "left of", then swap.
    a, b = radii if relation in ("above", "left of") else radii[::-1]
    apart = (a + b + _GAP) * _LATTICE
    pairs = [(i, j) for i in _lattice(a) for j in _lattice(b) if j - i >= apart]
    start, end = pairs[rng.integers(len(pairs))]
    level = [(i, j) for i in _lattice(a) for j in _lattice(b) if abs(i - j) <= _SLANT * (end - start)]
    across_a, across_b = level[rng.integers(len(level))]
    along = [(start / _LATTICE, across_a / _LATTICE), (end / _LATTICE, across_b / _LATTICE)]
    if relation in ("below", "right of"):
        along.reverse()
    return [(across, main) for main, across in along] if relation in ("above", "below") else along


# --- rendering


def _unit_outlines() -> dict[str, NDArray[np.float64]]:
    def ring(radii: list[float], start: float) -> NDArray[np.float64]:
        angles = start + np.arange(len(radii)) * 2 * math.pi / len(radii)
        points: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points *= np.array(radii)[:, None]
        return points

    return {
        "square": np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
        "star": ring([1.0, 0.42] * 5, -math.pi / 2),
        "tee": np.array(
            [(-1.0, -1.0), (1.0, -1.0), (1.0, 0.0), (0.5, 0.0), (0.5, 1.0), (-0.5, 1.0), (-0.5, 0.0), (-1.0, 0.0)]
        ),
        "ell": np.array([(-1.0, -1.0), (0.0, -1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (-1.0, 1.0)]),
        "bar": np.array([(-1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (-1.0, 1.0)]),
        "post": np.array([(-1.0, -1.0), (0.0, -1.0), (0.0, 1.0), (-1.0, 1.0)]),
    }


OUTLINES = _unit_outlines()
"""Corner points (points, 2) of each shape at radius 1 around (0, 0), y downwards."""


@lru_cache(maxsize=4096)
def coverage(shape: str, x: float, y: float, radius: float, side: int) -> NDArray[np.float64]:
    """Return the share of each pixel that a silhouette covers, (side, side); ``x``, ``y``, ``radius`` in pixels.

    It is sampled at 4 x 4 points per pixel, by the even-odd rule. The array is cached, so it is read-only.
    """
    points = OUTLINES[shape] * radius + np.array([x, y])
    centres = (np.arange(side * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    inside = np.zeros((len(centres), len(centres)), dtype=bool)
    for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0), strict=True):
        rows = (ya > centres) != (yb > centres)
        if rows.any():
            edge = xa + (centres[rows] - ya) * (xb - xa) / (yb - ya)
            inside[rows] ^= centres < edge[:, None]
    share: NDArray[np.float64] = inside.reshape(side, _SUPERSAMPLE, side, _SUPERSAMPLE).mean(axis=(1, 3))
    share.flags.writeable = False
    return share


def paint(picture: NDArray[np.float64], shape: str, x: float, y: float, radius: float, colour: str) -> None:
    """Paint a silhouette onto ``picture`` (height, width, 3) in-place; ``x``, ``y``, ``radius`` in pixels."""
    reach = math.ceil(radius) + 1
    left, top = math.floor(x) - reach, math.floor(y) - reach
    share = coverage(shape, x - left, y - top, radius, 2 * reach + 1)
    height, width, _ = picture.shape
    rows, columns = (slice(max(a, 0), min(a + 2 * reach + 1, n)) for a, n in ((top, height), (left, width)))
    share = share[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, None]
    picture[rows, columns] += share * (np.array(COLOURS[colour]) - picture[rows, columns])


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """Render a scene as an anti-aliased picture, (size, size, 3) uint8; ``size`` is a multiple of 8, at least 32."""
    if size < 32 or size % 8:
        raise ValueError(f"size {size}: a picture's side is a multiple of 8 and at least 32")
    picture = np.full((size, size, 3), BACKGROUND, dtype=np.float64)
    for thing in scene.things:
        paint(picture, thing.shape, thing.x * size, thing.y * size, thing.radius * size, thing.colour)
    return np.rint(picture).astype(np.uint8)


# --- captions

_SINGLE_FORMS = ("a {0}", "one {0}", "there is a {0}", "a picture of a {0}", "a {0} on its own")
_PAIR_FORMS = (
    "a {0} {r} a {1}",
    "a {0} is {r} a {1}",
    "there is a {0} {r} a {1}",
    "a picture of a {0} {r} a {1}",
    "{r} a {1} is a {0}",
)


def _words(relation: str) -> tuple[str, ...]:
    return (relation, f"to the {relation}") if relation in ("left of", "right of") else (relation,)


def phrasings(scene: Scene) -> list[str]:
    """Return every caption of the scene; a pair is described from either thing's side."""
    facts = [" ".join(thing.fact) for thing in scene.things]
    if scene.relation is None:
        return [form.format(facts[0]) for form in _SINGLE_FORMS]
    sides = ((facts, scene.relation), (facts[::-1], INVERSE[scene.relation]))
    return [form.format(*pair, r=words) for form in _PAIR_FORMS for pair, r in sides for words in _words(r)]


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random one of the scene's ``phrasings``."""
    forms = phrasings(scene)
    return forms[int(rng.integers(len(forms)))]


def _pattern(form: str) -> re.Pattern[str]:
    thing = f"(?:{'|'.join(SIZES)}) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
    relation = "|".join(words for r in RELATIONS for words in _words(r))
    return re.compile(form.replace("{0}", f"(?P<a>{thing})").replace("{1}", f"(?P<b>{thing})")
                      .replace("{r}", f"(?P<r>{relation})"))  # fmt: skip


_PATTERNS = tuple(_pattern(form) for form in _SINGLE_FORMS + _PAIR_FORMS)


def parse_caption(text: str) -> Claim:
    """Parse a caption in one of this world's phrasings; case and spacing do not matter.

    Raises:
        ValueError: the text is not such a caption.
    """
    plain = " ".join(text.lower().split())
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(plain):
            found = match.groupdict()
            facts = [Fact(*found[name].split()) for name in ("a", "b") if found.get(name)]
            relation = found.get("r")
            return _canonical(facts, relation.removeprefix("to the ") if relation else None)
    raise ValueError(f"not a caption of the shapes world: {text!r}")


# --- writing


def _row(seed: int, split: str, index: int, size: int) -> Row:
    scene = random_scene(seed, split, index)
    caption = random_caption(scene, counter_rng(seed, "caption", split, index))
    return Row(asdict(scene), render(scene, size), caption)


WORLD_FACTS = {"held_out": sorted(list(pair) for pair in HELD_OUT)}
_WORLD = World("shapes", FORMAT_VERSION, _row, multiple=8, facts=WORLD_FACTS)


def make_shapes(out: Path, n: int, test_n: int, seed: int, size: int = 64) -> WrittenWorld:
    """Write this world to a folder; see ``write_world``."""
    return write_world(_WORLD, out, n, test_n, seed, size)
