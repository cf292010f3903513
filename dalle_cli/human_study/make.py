"""Make a study: pairs of pictures on random sides, and attention checks among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.captions import read_captions_by_id
from dalle_cli.data.images import BadImage, decode_image, eval_crop
from dalle_cli.data.source import BadSample, read_image_file
from dalle_cli.errors import UserError
from dalle_cli.human_study.study import KEY, PICTURES, SIDES, STUDY, Item, Key, KeyItem, Side, Study
from dalle_cli.human_study.systems import System, check_same_captions, read_system
from dalle_cli.progress import log, progress
from dalle_cli.randomness import numpy_generator, stream_seed
from dalle_cli.stores.files import new_directory, owned, write_atomically
from dalle_cli.stores.png import encode_png

PAIRS_PER_CHECK, MIN_CHECKS = 10, 4


@dataclass(frozen=True)
class StudyRequest:
    """Settings of a study; ``systems`` maps each system's name to the path of its pictures."""

    systems: Mapping[str, str]
    captions: Path
    annotators: int = 5
    pairs: int | None = None
    """Number of captions, drawn by the seed; None for all."""
    checks: int | None = None
    """Number of attention checks; None for one per ten pairs, at least four."""
    image_size: int = 256
    seed: int = 0


def make_study(request: StudyRequest, out: Path) -> Study:
    """Write the study's folder, whole or not at all.

    Every picture is centre-cropped, resized to one size and stored uncompressed under a random name, so that neither
    names, dimensions, file sizes nor metadata tell the systems apart. Half of the pairs have the first system on
    the left. A check shows one of the study's pictures beside uniform noise.

    Raises:
        UserError: there are not two systems, only one of them drew some caption, a picture is broken, ``out`` is not
            empty, or another process is writing it.
    """
    with owned(out):
        return _make_study(request, out)


def _make_study(request: StudyRequest, out: Path) -> Study:
    if len(request.systems) != 2:
        raise UserError(f"a study compares two systems, not {len(request.systems)}; give --system NAME=PICTURES twice")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and may hold votes; choose another folder, or remove it yourself")
    captions = _distinct(read_captions_by_id(request.captions))
    first, second = (read_system(name, spec, captions) for name, spec in request.systems.items())
    for system in (first, second):
        if system.others:
            log(f"system {system.name}: {system.others} pictures belong to no caption of {request.captions}; left out")
    drawn = check_same_captions((first, second), captions)
    if left_out := len(captions) - len(drawn):
        log(f"{left_out} of {len(captions)} captions have no picture in either system; left out")
    chosen = _choose(drawn, request.pairs, request.seed)

    with new_directory(out) as folder:
        (folder / PICTURES).mkdir()
        writer = _Writer(folder / PICTURES, request, captions)
        items, sides = writer.pairs(chosen, (first, second))
        checks = request.checks
        if checks is None:
            checks = max(MIN_CHECKS, -(-len(chosen) // PAIRS_PER_CHECK))
        items += writer.checks(chosen, (first, second), checks)
        study = Study(
            annotators=request.annotators,
            image_size=request.image_size,
            items=tuple(sorted(items, key=lambda item: item.id)),
        )
        key = Key(
            study=study.sha256,
            systems=dict(request.systems),
            captions=str(request.captions),
            captions_left_out=left_out,
            seed=request.seed,
            items=sides,
        )
        write_atomically(folder / STUDY, study.model_dump_json(indent=2) + "\n")
        write_atomically(folder / KEY, key.model_dump_json(indent=2) + "\n")
    log(f"{len(chosen)} pairs and {checks} attention checks, {request.annotators} annotators each")
    return study


@dataclass(frozen=True)
class _Writer:
    """Makes items and writes their pictures."""

    folder: Path
    request: StudyRequest
    captions: Mapping[str, str]

    def pairs(self, chosen: list[str], systems: tuple[System, System]) -> tuple[list[Item], dict[str, KeyItem]]:
        items, key, equal = [], {}, 0
        sides = self._sides("pair", len(chosen))
        with progress("human-study make", len(chosen), "pairs") as bar:
            for place, identity in enumerate(chosen):
                shown = systems if sides[place] == "left" else systems[::-1]
                pictures = [_read(system.pictures[identity], self.request.image_size) for system in shown]
                equal += np.array_equal(pictures[0], pictures[1])
                left, right = (self._write("pair", place, side, p) for side, p in zip(SIDES, pictures, strict=True))
                name = self._name("pair", place, "item")
                items.append(Item(id=name, caption=self.captions[identity], left=left, right=right))
                key[name] = KeyItem(caption_id=identity, left=shown[0].name, right=shown[1].name)
                bar.advance()
        if equal:
            log(f"{equal} pairs show the same picture twice; votes on them mean nothing")
        return items, key

    def checks(self, chosen: list[str], systems: tuple[System, System], count: int) -> list[Item]:
        """Make attention checks: a picture beside noise, from the two systems in turn."""
        size, seed, items = self.request.image_size, self.request.seed, []
        captions = numpy_generator(seed, "human-study", "checks").permutation(len(chosen))
        for place, right_answer in enumerate(self._sides("check", count)):
            identity = chosen[captions[place % len(chosen)]]
            picture = _read(systems[place % 2].pictures[identity], size)
            noise = numpy_generator(seed, "human-study", "noise", place).integers(0, 256, (size, size, 3), np.uint8)
            shown = (picture, noise) if right_answer == "left" else (noise, picture)
            left, right = (self._write("check", place, side, p) for side, p in zip(SIDES, shown, strict=True))
            items.append(Item(id=self._name("check", place, "item"), caption=self.captions[identity],
                              left=left, right=right, check=right_answer))  # fmt: skip
        return items

    def _sides(self, what: str, count: int) -> list[Side]:
        """Return ``count`` sides in random order, as many left as right (or one more)."""
        order = numpy_generator(self.request.seed, "human-study", "sides", what).permutation(count)
        return [SIDES[place % 2] for place in order]

    def _name(self, what: str, place: int, part: str) -> str:
        return f"{stream_seed(self.request.seed, 'human-study', 'name', what, place, part):016x}"

    def _write(self, what: str, place: int, side: Side, picture: NDArray[np.uint8]) -> str:
        name = f"{self._name(what, place, side)}.png"
        # Not compressed, since a compressed file's size would reveal smooth pictures.
        (self.folder / name).write_bytes(encode_png(picture, compress_level=0))
        return name


def _distinct(captions: Mapping[str, str]) -> dict[str, str]:
    """Keep the first id of each caption, so that no caption is shown twice."""
    first: dict[str, str] = {}
    for identity, caption in captions.items():
        first.setdefault(caption, identity)
    distinct = {identity: caption for caption, identity in first.items()}
    if repeats := len(captions) - len(distinct):
        log(f"{repeats} captions are repeated; the first of each is used")
    return distinct


def _choose(drawn: list[str], pairs: int | None, seed: int) -> list[str]:
    if pairs is None:
        return drawn
    if pairs > len(drawn):
        raise UserError(f"--pairs {pairs}: both systems drew only {len(drawn)} captions; ask for fewer")
    chosen = numpy_generator(seed, "human-study", "pairs").choice(len(drawn), pairs, replace=False)
    return [drawn[place] for place in sorted(chosen)]


def _read(path: Path, size: int) -> NDArray[np.uint8]:
    try:
        return eval_crop(decode_image(read_image_file(path)), size)
    except (BadSample, BadImage) as error:
        raise UserError(f"{path}: {error}; draw or fetch the picture again") from None
