"""The two-panel world: a thing in the picture's top half, and below "the exact same shape" changed as the caption says.

The caption does not name the thing, so that whoever completes the bottom has to look at the top. It is the task of
image-to-image ("the exact same cat on the top as a sketch on the bottom") on pictures that can be judged by measuring
them. Some (colour, shape) pairs are never on top in training; below they may be, where a colour is asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dalle_cli.shapes.oracle import Detection, detect
from dalle_cli.shapes.world import BACKGROUND, COLOURS, HELD_OUT, SHAPES, WORLD_FACTS, Fact, counter_rng, paint
from dalle_cli.shapes.writer import Row, World, write_world

FORMAT_VERSION = 1  # of the world: raise it when the same seed gives other bytes
RADII = {"small": 1 / 8, "large": 3 / 16}
"""As fractions of the picture's side: a large thing fills its half but for a margin."""
DARK = (0, 0, 0)
GROUNDS = {"white": BACKGROUND, "black": DARK}
CHANGES = ("same", "smaller", "on black", *(f"in {colour}" for colour in COLOURS))
"""What the caption asks of the bottom."""

_PLACES = 8  # centres lie on a lattice of so many steps a side, along the panel's middle
_SEAM = 32  # this part of the side beside a half's edges is not looked at: there the grounds run into each other
_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Panel:
    """One half: a thing in its middle, ``x`` (a fraction of the side) from the left, on a ground of GROUNDS."""

    size: str
    colour: str
    shape: str
    ground: str
    x: float

    @property
    def fact(self) -> Fact:
        return Fact(self.size, self.colour, self.shape)


@dataclass(frozen=True)
class Panels:
    """A picture of two halves; ``change`` leads from the top to the bottom."""

    top: Panel
    change: str
    bottom: Panel

    @property
    def caption(self) -> str:
        """Lower case, words separated by single blanks."""
        if self.change == "same":
            return "the exact same shape on the top and on the bottom"
        return f"the exact same shape on the top {self.change} on the bottom"


def changed(top: Panel, change: str) -> Panel:
    """The bottom that ``change`` asks for."""
    if change not in CHANGES:
        raise ValueError(f"unknown change {change!r}: one of {', '.join(CHANGES)}")
    colour = change.removeprefix("in ") if change.startswith("in ") else top.colour
    size = "small" if change == "smaller" else top.size
    return Panel(size, colour, top.shape, "black" if change == "on black" else top.ground, top.x)


def random_panels(seed: int, split: str, index: int) -> Panels:
    """The picture of a row. "train" and "seen" have no held-out pair on top, "heldout" has one."""
    rng = counter_rng(seed, "panels", split, index)
    pairs = [pair for pair in _PAIRS if (pair in HELD_OUT) == (split == "heldout")]
    colour, shape = pairs[rng.integers(len(pairs))]
    # One kind of change as often as another, rather than each colour.
    kind = ("same", "smaller", "on black", "colour")[rng.integers(4)]
    size = "large" if kind == "smaller" else tuple(RADII)[rng.integers(len(RADII))]
    others = [other for other in COLOURS if other != colour]
    change = f"in {others[rng.integers(len(others))]}" if kind == "colour" else kind
    places = range(_PLACES // 4, _PLACES - _PLACES // 4 + 1)
    top = Panel(size, colour, shape, "white", places[rng.integers(len(places))] / _PLACES)
    return Panels(top, change, changed(top, change))


def render_panels(this: Panels, size: int = 64, *, bottom: bool = True) -> NDArray[np.uint8]:
    """The picture, anti-aliased, (size, size, 3) uint8, ``size`` a multiple of 16; without ``bottom`` that half is
    empty, as where it has yet to be drawn.
    """
    if size < 32 or size % 16:
        raise ValueError(f"size {size}: a picture's side is a multiple of 16 and at least 32")
    picture = np.full((size, size, 3), BACKGROUND, dtype=np.float64)
    for panel, begin in ((this.top, 0), (this.bottom, size // 2)):
        if begin and not bottom:
            break
        half = picture[begin : begin + size // 2]
        half[:] = GROUNDS[panel.ground]
        paint(half, panel.shape, panel.x * size, size / 4, RADII[panel.size] * size, panel.colour)
    return np.rint(picture).astype(np.uint8)


def read_panel(half: NDArray[np.uint8]) -> tuple[str, list[tuple[Fact, Detection]]]:
    """What a half (side / 2, side, 3) uint8 shows: its ground, and each thing's size, colour and shape."""
    height, width, _ = half.shape
    if 2 * height != width:
        raise ValueError(f"a panel is (side / 2, side, 3), not {half.shape}")
    seam = width // _SEAM
    half = half[seam : height - seam]
    ground = np.median(np.concatenate([half[0], half[-1], half[:, 0], half[:, -1]]), axis=0)
    square = np.empty((width, width, 3), dtype=np.uint8)
    square[:] = np.rint(ground).astype(np.uint8)
    square[height // 2 + seam : height // 2 + seam + len(half)] = half
    middle = sum(RADII.values()) / 2
    things = [
        (Fact("small" if found.radius < middle else "large", found.colour, found.shape), found)
        for found in detect(square)
    ]
    return ("black" if ground.mean() < 128 else "white"), things


def bottom_matches(top: Panel, change: str, picture: NDArray[np.uint8]) -> bool:
    """Whether the bottom half of ``picture`` (side, side, 3) uint8 is ``top`` changed, and shows nothing else.

    Judged are the ground, the number of things, and the thing's size, colour and shape; not its place.
    """
    ground, things = read_panel(picture[len(picture) // 2 :])
    wanted = changed(top, change)
    return ground == wanted.ground and [fact for fact, _ in things] == [wanted.fact]


def _row(seed: int, split: str, index: int, size: int) -> Row:
    this = random_panels(seed, split, index)
    return Row(asdict(this), render_panels(this, size), this.caption)


make_panels = partial(write_world, World("panels", FORMAT_VERSION, _row, multiple=16, facts=WORLD_FACTS))
"""`worlds.write_world` of this world."""
