"""The benchmark's data sets: training and held-out pictures with captions and, where they have them, class labels."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dalle_cli.data.open_source import open_source
from dalle_cli.errors import UserError

DRAWINGS = ["dvae.objective.perceptual.weight=1", "prior.token_noise=0.15"]
SETTINGS = {
    "grocery": ["data.crop=true", "data.flip=true", "data.views=8"],
    "fluent-emoji-3d": DRAWINGS,
    "twemoji": DRAWINGS,
}
"""Settings of a recipe that suit the pictures of a data set; drawings are neither cropped nor mirrored."""
HELD_OUT_SHARE = 0.1
"""Share of the samples to hold out of a data set that has no test split of its own."""


@dataclass(frozen=True)
class Sample:
    """A picture's file, with its captions and its labels by name."""

    key: str
    picture: bytes
    captions: list[str]
    labels: dict[str, str]
    held_out: bool


@dataclass(frozen=True)
class DataSet:
    """A data set unpacked into the folder ``root``: pictures, and a manifest of each of its two parts."""

    root: Path

    @property
    def train(self) -> Path:
        """Manifest of the pictures that every system trains on."""
        return self.root / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """Manifest of the pictures that no system sees."""
        return self.root / "held-out.jsonl"

    def rows(self, manifest: Path) -> list[dict[str, Any]]:
        """Return a part's pictures: path, key, captions and labels of each."""
        return list(json.loads(manifest.with_suffix(".labels.json").read_text()))


def unpack(name: str, source: Path, root: Path) -> DataSet:
    """Unpack the data set at ``source`` into ``root``, unless that was done before.

    Raises:
        UserError: the data set is unknown, or is not at ``source``.
    """
    if name not in READERS:
        raise UserError(f"{name}: is no data set of this benchmark; choose {', '.join(READERS)}")
    found = DataSet(root)
    if found.held_out.is_file():
        return found
    if not source.exists():
        raise UserError(f"{source}: is not there; give the data set's place with --source")
    parts: dict[Path, list[dict[str, Any]]] = {found.train: [], found.held_out: []}
    for sample in READERS[name](source):
        path = root / "pictures" / sample.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.picture)
        row = {"path": f"pictures/{sample.key}", "key": Path(sample.key).stem, "captions": sample.captions}
        parts[found.held_out if sample.held_out else found.train].append({**row, "labels": sample.labels})
    for manifest, rows in parts.items():
        manifest.with_suffix(".labels.json").write_text(json.dumps(rows))
        lines = [
            json.dumps({"path": row["path"], "key": row["key"], "caption": caption})
            for row in rows
            for caption in row["captions"]
        ]
        manifest.write_text("\n".join(lines) + "\n")
    return found


def _grocery(source: Path) -> Iterator[Sample]:
    for split in ("train", "validation", "test"):
        for row in _parquet(source, f"{split}-*.parquet"):
            labels = {"kind": row["coarse"], "product": row["class"]}
            picture = row["image"]
            yield Sample(picture["path"], picture["bytes"], row["captions"], labels, split != "train")


def _fluent(source: Path) -> Iterator[Sample]:
    for row in _parquet(source, "train-*.parquet"):
        picture, labels = row["image"], {"group": str(row["group"])}
        yield Sample(picture["path"], picture["bytes"], [row["text"]], labels, _held_out(row["code"]))


def _captioned(source: Path) -> Iterator[Sample]:
    found = open_source(str(source))
    for i in range(len(found)):
        key = found.key(i)
        yield Sample(f"{key}.png", found.image_bytes(i), list(found.captions(i)), {}, _held_out(key))


def _shapes(source: Path) -> Iterator[Sample]:
    """Yield the samples of a folder of ``dalle make-shapes``; its two test splits are held out."""
    for split in ("train", "seen", "heldout"):
        for sample in _captioned(source / split):
            yield replace(sample, key=f"{split}-{Path(sample.key).name}", held_out=split != "train")


def _parquet(source: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for file in sorted((source / "data").glob(pattern)):
        yield from pq.read_table(file).to_pylist()


def _held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) / 2**32 < HELD_OUT_SHARE


READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "grocery": _grocery,
    "fluent-emoji-3d": _fluent,
    "twemoji": _captioned,
    "shapes": _shapes,
}
"""Reader of each data set, by its name."""
