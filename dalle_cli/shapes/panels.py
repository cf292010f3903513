"""The two-panel world: a thing in the top half, and below it the same shape, changed as the caption says.

The caption does not name the thing, so a model that completes the bottom half has to look at the top half. This is the
paper's image-to-image translation ("the exact same cat on the top as a sketch on the bottom") with pictures that can be
judged by measurement. In training, a held-out (colour, shape) pair is never in the top half, but a caption that asks
for a colour may put it in the bottom half.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle_cli.shapes.drawing import BACKGROUND, paint
from dalle_cli.shapes.oracle import Detection, detect
from dalle_cli.shapes.scene import LATTICE, Fact, counter_rng, select_pairs
from dalle_cli.shapes.world import held_out_facts
from dalle_cli.shapes.writer import Row, World, WrittenWorld, write_world

FORMAT_VERSION = 1
"""Version of the world, to be raised when the same seed gives other bytes."""
RADII = {"small": 1 / 8, "large": 3 / 16}
"""Radii as fractions of the picture's side; a large thing fills its half except for a margin."""
DARK = (0, 0, 0)
GROUNDS = {"white": BACKGROUND, "black": DARK}
"""Background colours of a half by name."""
CHANGES = ("same", "smaller", "on black", *(f"in {colour}" for colour in LATTICE.colours))
"""Changes that a caption may ask for."""

_PLACES = 8
"""Number of steps per side of the lattice of centres, which lie on the panel's middle line."""
_SEAM = 32
"""Inverse of the share of the side that is ignored at the top and bottom of a half, where backgrounds blend."""


@dataclass(frozen=True)
class Panel:
    """One half: a thing on its middle line, at ``x`` (a fraction of the side), on a background of GROUNDS."""

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
    """A picture of two halves; ``change`` turns the top into the bottom."""

    top: Panel
    change: str
    bottom: Panel

    @property
    def caption(self) -> str:
        if self.change == "same":
            return "the exact same shape on the top and on the bottom"
        return f"the exact same shape on the top {self.change} on the bottom"


def apply_change(top: Panel, change: str) -> Panel:
    """Return the bottom panel that ``change`` asks for."""
    if change not in CHANGES:
        raise ValueError(f"unknown change {change!r}: one of {', '.join(CHANGES)}")
    colour = change.removeprefix("in ") if change.startswith("in ") else top.colour
    size = "small" if change == "smaller" else top.size
    return Panel(size, colour, top.shape, "black" if change == "on black" else top.ground, top.x)


def random_panels(seed: int, split: str, index: int) -> Panels:
    """Return the panels of a row: the top of "train" and "seen" has no held-out pair, that of "heldout" has one."""
    rng = counter_rng(seed, "panels", split, index)
    pairs = select_pairs(LATTICE, held_out=split == "heldout")
    colour, shape = pairs[rng.integers(len(pairs))]
    # Each kind of change is equally frequent, rather than each colour.
    kind = ("same", "smaller", "on black", "colour")[rng.integers(4)]
    size = "large" if kind == "smaller" else tuple(RADII)[rng.integers(len(RADII))]
    others = [other for other in LATTICE.colours if other != colour]
    change = f"in {others[rng.integers(len(others))]}" if kind == "colour" else kind
    places = range(_PLACES // 4, _PLACES - _PLACES // 4 + 1)
    top = Panel(size, colour, shape, "white", places[rng.integers(len(places))] / _PLACES)
    return Panels(top, change, apply_change(top, change))


def render_panels(panels: Panels, size: int = 64, *, bottom: bool = True) -> NDArray[np.uint8]:
    """Render the panels as an anti-aliased picture, (size, size, 3) uint8, ``size`` a multiple of 16, at least 32.

    Without ``bottom``, the bottom half is left empty for a model to complete.
    """
    if size < 32 or size % 16:
        raise ValueError(f"size {size}: a picture's side is a multiple of 16 and at least 32")
    picture = np.full((size, size, 3), BACKGROUND, dtype=np.float64)
    for panel, start in ((panels.top, 0), (panels.bottom, size // 2)):
        if start and not bottom:
            break
        half = picture[start : start + size // 2]
        half[:] = GROUNDS[panel.ground]
        paint(half, panel.shape, panel.x * size, size / 4, RADII[panel.size] * size, panel.colour)
    return np.rint(picture).astype(np.uint8)


def read_panel(half: NDArray[np.uint8]) -> tuple[str, list[tuple[Fact, Detection]]]:
    """Return the background of a half (side / 2, side, 3) uint8, and the attributes and detection of each thing."""
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
        (Fact("small" if thing.radius < middle else "large", thing.colour, thing.shape), thing)
        for thing in detect(square)
    ]
    return ("black" if ground.mean() < 128 else "white"), things


def bottom_matches(top: Panel, change: str, picture: NDArray[np.uint8]) -> bool:
    """Return whether the bottom half of ``picture`` (side, side, 3) uint8 shows ``top`` changed, and nothing else.

    The background, the number of things, and the thing's size, colour and shape are judged, but not its place.
    """
    ground, things = read_panel(picture[len(picture) // 2 :])
    wanted = apply_change(top, change)
    return ground == wanted.ground and [fact for fact, _ in things] == [wanted.fact]


def _row(seed: int, split: str, index: int, size: int) -> Row:
    panels = random_panels(seed, split, index)
    return Row(asdict(panels), render_panels(panels, size), panels.caption)


_WORLD = World("panels", FORMAT_VERSION, _row, multiple=16, facts=held_out_facts(LATTICE))


def make_panels(out: Path, n: int, test_n: int, seed: int, size: int = 64) -> WrittenWorld:
    """Write this world to a folder; see ``write_world``."""
    return write_world(_WORLD, out, n, test_n, seed, size)
