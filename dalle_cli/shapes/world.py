"""Captions of scenes, and the worlds of captioned scenes that ``dalle make-shapes`` writes."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from dalle_cli.shapes.drawing import random_ground, render
from dalle_cli.shapes.scene import (
    COLOURS,
    INVERSE,
    LATTICE,
    RELATIONS,
    SHAPES,
    SIZES,
    Claim,
    Fact,
    Kind,
    Scene,
    canonical,
    counter_rng,
    random_scene,
    select_pairs,
)
from dalle_cli.shapes.writer import Row, World, WrittenWorld, write_world

FORMAT_VERSION = 2
"""Version of the world, to be raised when the same seed gives other bytes."""

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
            return canonical(facts, relation.removeprefix("to the ") if relation else None)
    raise ValueError(f"not a caption of the shapes world: {text!r}")


def _row(seed: int, split: str, index: int, size: int, kind: Kind) -> Row:
    scene = random_scene(seed, split, index, kind)
    caption = random_caption(scene, counter_rng(seed, "caption", split, index))
    if not kind.shaded:
        return Row(asdict(scene), render(scene, size), caption)
    ground = random_ground(seed, split, index)
    return Row({**asdict(scene), "ground": asdict(ground)}, render(scene, size, ground), caption)


def held_out_facts(kind: Kind) -> dict[str, list[list[str]]]:
    """Return the entry of world.json with the pairs that are held out."""
    return {"held_out": sorted(map(list, select_pairs(kind, held_out=True)))}


def make_shapes(out: Path, n: int, test_n: int, seed: int, size: int = 64, *, kind: Kind = LATTICE) -> WrittenWorld:
    """Write a world of this ``kind`` to a folder; see ``write_world``."""
    row = partial(_row, kind=kind)
    world = World(kind.name, FORMAT_VERSION, row, multiple=8, facts=held_out_facts(kind))
    return write_world(world, out, n, test_n, seed, size)
