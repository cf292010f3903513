"""Splitting the making of a token store among processes that share nothing but a file system.

Process i of n (counted from 1) makes the i-th run of the source's samples in a store of its own, beside the one that
``dalle merge`` joins them into: ``tokens.zarr.parts/image-0003-of-0008.zarr``. Its borders lie where a whole store's
shard files have theirs, so that joining is renaming.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dalle_cli.errors import UserError

Part = Literal["text", "image"]
COMMANDS: dict[Part, str] = {"text": "tokenize-text", "image": "encode-images"}
"""What makes each part of a store."""


@dataclass(frozen=True)
class Shard:
    """The ``number``-th of ``of`` equal shares of the work, counted from 1; 1/1 is all of it, in the store itself."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"no shard {self.number} of {self.of}")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def rows(self, samples: int, multiple: int) -> range:
        """Its rows of a source of ``samples``; they begin at a multiple of ``multiple``, and may be none."""
        files = -(-samples // multiple)
        start, stop = (files * n // self.of * multiple for n in (self.number - 1, self.number))
        return range(min(start, samples), min(stop, samples))

    def store(self, whole: Path, part: Part) -> Path:
        """Where its share of the ``part`` of the store ``whole`` is made."""
        if self == WHOLE:
            return whole
        return parts_folder(whole) / f"{part}-{self.number:04d}-of-{self.of:04d}.zarr"


WHOLE = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """``"3/8"``. Raises UserError for anything else, and for a number that is not from 1 to the count."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: is I/N with I from 1 to N, such as 1/8 for the first of eight")
    return Shard(int(match[1]), int(match[2]))


def parts_folder(whole: Path) -> Path:
    """The folder of the shares of the store ``whole``."""
    return whole.with_name(f"{whole.name}.parts")


def parts_of(whole: Path, part: Part) -> list[Shard]:
    """The shares of ``part`` that have been begun, in order."""
    found = []
    for path in sorted(parts_folder(whole).glob(f"{part}-*-of-*.zarr")):
        match = re.fullmatch(rf"{part}-([0-9]+)-of-([0-9]+)\.zarr", path.name)
        if match is not None and 1 <= int(match[1]) <= int(match[2]):
            found.append(Shard(int(match[1]), int(match[2])))
    return found
