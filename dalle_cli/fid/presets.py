"""Presets of published evaluations: the captions to draw and the pictures to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dalle_cli.data.formats.published import coco_captions, cub_captions, cub_root
from dalle_cli.data.source import BadSample, read_caption_file
from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.files import split_lines

Name = Literal["coco", "cub"]
PAPERS_COCO = 30_000
"""Number of COCO's captions that the paper draws (figure 9)."""
COCO_FILES = ("captions_val2014.json", "captions_val2017.json")
CUB_FILES = ("images.txt", "images", "train_test_split.txt")


@dataclass(frozen=True)
class Preset:
    """Captions and reference pictures of a published evaluation."""

    captions: dict[str, str]
    """Captions by id, in the order drawn."""
    pictures: dict[str, Path]
    """Real picture of each caption, by the caption's id."""
    reference: list[Path]
    """All real pictures to compare with."""
    protocol: str
    """Description of captions and reference, in a sentence."""
    warnings: list[str]


def open_preset(name: Name, spec: str, count: int | None, seed: int) -> Preset:
    """Draw ``count`` captions of a data set from ``spec``, its folder as published (or for COCO a captions file).

    Without ``count`` they are as many as in the paper (figure 9): 30,000 of COCO, all different ones of CUB.
    ``coco`` draws from the validation set of 2014, or else of 2017; a caption's id is its annotation's. ``cub`` draws
    from the test part of CUB-200-2011, given by Reed et al.'s testclasses.txt or else by train_test_split.txt; a
    caption's id is its picture's number in images.txt and its line, such as ``17-3``. The reference is all pictures of
    the set drawn from.

    Raises:
        UserError: part of the data set is missing.
    """
    openers: dict[Name, Callable[[Path], tuple[str, list[tuple[str, Path, str]]]]] = {"coco": _coco, "cub": _cub}
    what, entries = openers[name](Path(spec))
    if not entries:
        raise UserError(f"{spec}: holds no caption of {what}")
    reference = sorted({picture for _, picture, _ in entries})
    if count is None and name == "cub":
        first: dict[str, tuple[str, Path, str]] = {}
        for entry in entries:
            first.setdefault(entry[2], entry)
        entries = list(first.values())
        count = len(entries)
    count = PAPERS_COCO if count is None else count
    order = numpy_generator(seed, "eval-fid", name).permutation(len(entries))[:count]
    chosen = [entries[number] for number in order]
    warnings = []
    if len(chosen) < count:
        warnings.append(
            f"{what} has {len(chosen):,} captions, all of which are drawn; figures of {count:,} are not comparable"
        )
    return Preset(
        {identity: caption for identity, _, caption in chosen},
        {identity: picture for identity, picture, _ in chosen},
        reference,
        f"{len(chosen):,} captions of {what}, drawn by seed {seed}; the reference is all {len(reference):,} pictures "
        "of that set.",
        warnings,
    )


def _coco(path: Path) -> tuple[str, list[tuple[str, Path, str]]]:
    file = path
    if not path.is_file():
        found = [path / "annotations" / name for name in COCO_FILES if (path / "annotations" / name).is_file()]
        if not found:
            raise UserError(
                f"{path}: annotations/{COCO_FILES[0]} is missing; unpack annotations_trainval2014.zip and val2014.zip "
                "there, or name a captions_*.json with its pictures' folder beside annotations/"
            )
        file = found[0]
    folder, entries = coco_captions(file)
    what = f"COCO's {file.stem.removeprefix('captions_')}"
    return what, [(number, folder / name, caption) for number, name, caption in entries]


def _cub(path: Path) -> tuple[str, list[tuple[str, Path, str]]]:
    root = cub_root(path)
    if root is None:
        base = path / "CUB_200_2011" if (path / "CUB_200_2011").is_dir() else path
        missing = [file for file in CUB_FILES if not (base / file).exists()] or ["a list of numbers and pictures in "
                                                                                "images.txt"]  # fmt: skip
        raise UserError(
            f"{base}: is not CUB-200-2011 as published: it lacks {', '.join(missing)}; unpack CUB_200_2011.tgz"
        )
    captions = cub_captions(str(path), root)
    images = dict(_numbered(root / "images.txt"))
    classes = next((file for file in (captions.parent / "testclasses.txt", root / "testclasses.txt",
                                      path / "testclasses.txt") if file.is_file()), None)  # fmt: skip
    if classes is not None:
        wanted = set(classes.read_text(encoding="utf-8").split())
        test = {number for number, image in images.items() if image.split("/")[0] in wanted}
        what = "CUB's test classes"
    else:
        split = root / "train_test_split.txt"
        if not split.is_file():
            raise UserError(
                f"{split}: is missing, and so is testclasses.txt: one of them says which pictures are the test part; "
                "unpack CUB_200_2011.tgz again"
            )
        test = {number for number, training in _numbered(split) if training == "0"}
        what = "CUB's test split"
    entries = []
    for number, image in images.items():
        if number not in test:
            continue
        file = (captions / image).with_suffix(".txt")
        try:
            texts = read_caption_file(file)
        except BadSample as error:
            raise UserError(f"{file}: {error}; unpack CUB's captions (text_c10) again") from None
        entries += [(f"{number}-{line}", root / "images" / image, text) for line, text in enumerate(texts, start=1)]
    return what, entries


def _numbered(file: Path) -> list[tuple[str, str]]:
    lines = (line.partition(" ") for line in split_lines(file.read_text(encoding="utf-8", errors="replace")))
    return [(number, rest.strip()) for number, _, rest in lines if number.isdecimal() and rest.strip()]
