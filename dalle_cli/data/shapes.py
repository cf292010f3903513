"""The built-in world: pictures of one or two coloured shapes, and captions that say exactly what is in them.

Nothing has to be downloaded, everything a caption claims can be checked on the picture (`oracle`), and a few
(colour, shape) pairs are kept out of training so that composing known words in a new way can be measured.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dalle_cli.errors import UserError

FORMAT_VERSION = 1  # of the world: raise it when the same seed gives other bytes
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 65),
    "blue": (35, 75, 215),
    "yellow": (245, 210, 25),
}
BACKGROUND = (255, 255, 255)
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Radii as fractions of the picture's side, far apart so that a size is never a matter of taste.
SIZES = {"small": 0.145, "large": 0.22}
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
RELATIONS = tuple(INVERSE)

# Pairs that never appear in training: each colour once.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "cross"),
        ("green", "star"),
        ("blue", "triangle"),
        ("yellow", "square"),
    }
)
_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
_HELD = tuple(pair for pair in _PAIRS if pair in HELD_OUT)
_FREE = tuple(pair for pair in _PAIRS if pair not in HELD_OUT)

SPLITS = ("train", "seen", "heldout")

_SINGLE_SHARE = 0.2
# Centres lie on a lattice of this many steps a side, so that a small model can learn the world in minutes.
_LATTICE = 16
_MARGIN = 0.015  # from the picture's edge
_GAP = 0.03  # between two things, along the relation's axis, at least
_SLANT = 0.3  # offset across the axis, at most this part of the distance along it
_SUPERSAMPLE = 4


class Fact(NamedTuple):
    """What a caption says of one thing."""

    size: str
    colour: str
    shape: str


class Claim(NamedTuple):
    """What a caption says, in one form for all phrasings; `relation` is "above", "left of" or None."""

    things: tuple[Fact, ...]
    relation: str | None


@dataclass(frozen=True)
class Thing:
    """One shape; `x`, `y` (its centre) and `radius` are fractions of the picture's side."""

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
    """One thing (relation None), or two things where the first stands in `relation` to the second."""

    things: tuple[Thing, ...]
    relation: str | None

    @property
    def claim(self) -> Claim:
        return _canonical([thing.fact for thing in self.things], self.relation)


def _canonical(facts: list[Fact], relation: str | None) -> Claim:
    if relation in ("below", "right of"):
        return Claim(tuple(reversed(facts)), INVERSE[relation])
    return Claim(tuple(facts), relation)


# --- drawing scenes at random ---------------------------------------------------------------------


def counter_rng(seed: int, what: str, split: str, index: int) -> np.random.Generator:
    """A generator that depends on (seed, what, split, index) only, so any row can be made alone."""
    words = [int.from_bytes(what.encode(), "little"), SPLITS.index(split), index]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=words)))


def scene(seed: int, split: str, index: int) -> Scene:
    """The scene of a row. "train" and "seen" hold no held-out pair, "heldout" at least one."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    rng = counter_rng(seed, "scene", split, index)
    pairs = _draw_pairs(rng, count=1 if rng.random() < _SINGLE_SHARE else 2, heldout=split == "heldout")
    sizes = [tuple(SIZES)[rng.integers(len(SIZES))] for _ in pairs]
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
    """`count` different (colour, shape) pairs; with `heldout` at least one is a held-out pair."""
    if not heldout:
        return [_FREE[i] for i in rng.choice(len(_FREE), count, replace=False)]
    first = _HELD[rng.integers(len(_HELD))]
    others = [pair for pair in _PAIRS if pair != first]
    pairs = [first, *(others[i] for i in rng.choice(len(others), count - 1, replace=False))]
    return pairs[::-1] if rng.random() < 0.5 else pairs


def _lattice(radius: float) -> range:
    """Lattice steps at which a thing lies wholly inside the picture."""
    first = math.ceil((_MARGIN + radius) * _LATTICE)
    return range(first, _LATTICE - first + 1)


def _place(rng: np.random.Generator, radii: list[float], relation: str) -> list[tuple[float, float]]:
    """Centres of two things, apart along the relation's axis and nearly level across it."""
    # Work as if the first thing came first along the axis (above, left of), then swap.
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


# --- rendering ------------------------------------------------------------------------------------


def _unit_outlines() -> dict[str, NDArray[np.float64]]:
    def ring(radii: list[float], turn: float) -> NDArray[np.float64]:
        angles = turn + np.arange(len(radii)) * 2 * math.pi / len(radii)
        points: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        points *= np.array(radii)[:, None]
        return points

    side, arm = 0.88, 0.34
    quarter = [(arm, -1), (arm, -arm), (1, -arm)]
    cross = [point for turn in range(4) for point in (_turned(p, turn) for p in quarter)]
    return {
        "circle": ring([1.0] * 48, 0.0),
        "square": np.array([(-side, -side), (side, -side), (side, side), (-side, side)]),
        "triangle": np.array([(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]),
        "star": ring([1.05, 0.40] * 5, -math.pi / 2),
        "cross": np.array(cross),
    }


def _turned(point: tuple[float, float], quarters: int) -> tuple[float, float]:
    x, y = point
    for _ in range(quarters):
        x, y = -y, x
    return x, y


# Corner points of each shape at radius 1 around (0, 0), y downwards, each (points, 2).
OUTLINES = _unit_outlines()


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: object) -> None:
    """Fill a silhouette; `x`, `y`, `radius` in canvas pixels, where a pixel's centre is its index + 0.5."""
    points = OUTLINES[shape] * radius + np.array([x - 0.5, y - 0.5])
    draw.polygon(points.ravel().tolist(), fill=fill)  # type: ignore[arg-type]


def render(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """The scene as an anti-aliased picture, (size, size, 3) uint8; `size` is a multiple of 8, at least 32."""
    if size < 32 or size % 8:
        raise ValueError(f"size {size}: a picture's side is a multiple of 8 and at least 32")
    big = size * _SUPERSAMPLE
    canvas = Image.new("RGB", (big, big), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        draw_shape(draw, thing.shape, thing.x * big, thing.y * big, thing.radius * big, COLOURS[thing.colour])
    return np.asarray(canvas.reduce(_SUPERSAMPLE))


# --- captions -------------------------------------------------------------------------------------

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
    """Every caption of the scene, all saying the same facts; two things are told from either side."""
    facts = [" ".join(thing.fact) for thing in scene.things]
    if scene.relation is None:
        return [form.format(facts[0]) for form in _SINGLE_FORMS]
    told = ((facts, scene.relation), (facts[::-1], INVERSE[scene.relation]))
    return [form.format(*pair, r=words) for form in _PAIR_FORMS for pair, r in told for words in _words(r)]


def captions(scene: Scene, rng: np.random.Generator) -> str:
    """One caption of the scene, lower-case, words separated by single blanks; `rng` picks the phrasing."""
    forms = phrasings(scene)
    return forms[int(rng.integers(len(forms)))]


def _pattern(form: str) -> re.Pattern[str]:
    thing = f"(?:{'|'.join(SIZES)}) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
    relation = "|".join(words for r in RELATIONS for words in _words(r))
    return re.compile(form.replace("{0}", f"(?P<a>{thing})").replace("{1}", f"(?P<b>{thing})")
                      .replace("{r}", f"(?P<r>{relation})"))  # fmt: skip


_PATTERNS = tuple(_pattern(form) for form in _SINGLE_FORMS + _PAIR_FORMS)


def parse_caption(text: str) -> Claim:
    """What a caption in one of this world's phrasings says (case and blanks are free); else ValueError."""
    plain = " ".join(text.lower().split())
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(plain):
            found = match.groupdict()
            facts = [Fact(*found[name].split()) for name in ("a", "b") if found.get(name)]
            relation = found.get("r")
            return _canonical(facts, relation.removeprefix("to the ") if relation else None)
    raise ValueError(f"not a caption of the shapes world: {text!r}")


# --- writing the world as shards ------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    path: str
    seed: int
    split: str
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class MadeShapes:
    """What `make_shapes` did: pictures written now, and pictures in shards that were already in place."""

    out: Path
    written: int
    kept: int


def make_shapes(
    out: str | Path,
    n: int,
    test_n: int,
    seed: int,
    size: int = 64,
    shard_rows: int = 1000,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> MadeShapes:
    """Write `n` training and 2 x `test_n` test pictures: OUT/SPLIT/shapes-00000.tar, ..., OUT/world.json.

    A row is KEY.png, KEY.txt (the caption) and KEY.json (the scene's facts); its content depends on (seed,
    split, row) only, never on `n`. A shard appears under its name only when whole, so a killed run goes on
    where it was. `progress(done, total)` is called with picture counts after each shard; `workers` processes
    share the shards. UserError for impossible settings and for a folder that holds anything else.
    """
    _check(n, test_n, seed, size, shard_rows, workers)
    out = Path(out)
    _claim_folder(
        out,
        {
            "kind": "shapes",
            "version": FORMAT_VERSION,
            "seed": seed,
            "size": size,
            "rows": {"train": n, "seen": test_n, "heldout": test_n},
            "shard_rows": shard_rows,
            "held_out": sorted(list(pair) for pair in HELD_OUT),
        },
    )
    shards = [
        _Shard(
            str(out / split / f"shapes-{number:05d}.tar"),
            seed,
            split,
            start,
            min(start + shard_rows, rows),
            size,
        )
        for split, rows in (("train", n), ("seen", test_n), ("heldout", test_n))
        for number, start in enumerate(range(0, rows, shard_rows))
    ]
    todo = [shard for shard in shards if not Path(shard.path).exists()]
    total = sum(shard.stop - shard.start for shard in shards)
    kept = done = total - sum(shard.stop - shard.start for shard in todo)
    if progress is not None:
        progress(done, total)
    if workers == 1 or len(todo) < 2:
        for shard in todo:
            done += _write_shard(shard)
            if progress is not None:
                progress(done, total)
    else:
        # Fresh processes rather than forks: the caller may hold threads (torch) that a fork would break.
        with ProcessPoolExecutor(min(workers, len(todo)), multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(_write_shard, shard) for shard in todo]):
                done += future.result()
                if progress is not None:
                    progress(done, total)
    return MadeShapes(out, written=total - kept, kept=kept)


def _check(n: int, test_n: int, seed: int, size: int, shard_rows: int, workers: int) -> None:
    if size < 32 or size % 8:
        raise UserError(f"size {size}: the pictures' side must be a multiple of 8 and at least 32")
    for name, value, least in (
        ("n", n, 1),
        ("test_n", test_n, 0),
        ("seed", seed, 0),
        ("shard_rows", shard_rows, 1),
        ("workers", workers, 1),
    ):
        if value < least:
            raise UserError(f"{name} {value}: must be at least {least}")


def _claim_folder(out: Path, settings: dict[str, object]) -> None:
    """Put world.json into `out`, or check that the one there says the same."""
    world = out / "world.json"
    if world.exists():
        try:
            found = json.loads(world.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{world} is not a world's settings: give another folder, or delete this one")
        different = [key for key in sorted({*settings, *found}) if settings.get(key) != found.get(key)]
        if different:
            key = different[0]
            raise UserError(
                f"{out} holds another shapes world (its {key} is {found.get(key)!r}, asked for is "
                f"{settings.get(key)!r}): give another folder, or delete this one"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and holds no shapes world (no world.json): give a new or empty folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_then_rename(world, (json.dumps(settings, indent=2) + "\n").encode())


def _write_then_rename(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _write_shard(shard: _Shard) -> int:
    """Write one shard whole; returns its number of pictures."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(shard.start, shard.stop):
            for suffix, data in _row(shard, index):
                header = tarfile.TarInfo(f"{index:08d}.{suffix}")  # its mtime, uid and gid are 0
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    path = Path(shard.path)
    path.parent.mkdir(exist_ok=True)
    _write_then_rename(path, buffer.getvalue())
    return shard.stop - shard.start


def _row(shard: _Shard, index: int) -> list[tuple[str, bytes]]:
    this = scene(shard.seed, shard.split, index)
    text = captions(this, counter_rng(shard.seed, "caption", shard.split, index))
    png = io.BytesIO()
    Image.fromarray(render(this, shard.size)).save(png, "PNG", compress_level=1)
    return [("json", json.dumps(asdict(this)).encode()), ("png", png.getvalue()), ("txt", text.encode())]
