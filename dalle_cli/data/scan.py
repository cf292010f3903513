"""A look at a source before anything is trained on it: sizes, captions, what is broken, what filters would drop."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from dalle_cli.config.schema import DataSettings, Filters
from dalle_cli.data.filters import (
    CAPTION_MEASURES,
    PICTURE_MEASURES,
    failed_caption_filters,
    failed_picture_filters,
    filter_captions,
    with_typical_limits,
)
from dalle_cli.data.images import BadImage, decode_image
from dalle_cli.data.languages import Detector
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
"""Per cent."""
EXAMPLES = 3
"""Samples named for each filter."""
BROKEN_NAMED = 20
_BLOCK = 32


@dataclass
class Tally:
    """Counts over some rows; those of other rows can be added, so that memory does not grow with the source.

    What is measured is counted by its value to three digits.
    """

    samples: int = 0
    usable: int = 0
    """With a picture and a caption that can be read, before any filter."""
    kept: int = 0
    """Usable and passed by the recipe's filters."""
    captions: int = 0
    measures: dict[str, Counter[float]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    broken_named: list[dict[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples by filter: pictures that it refuses, or whose captions it refuses, all of them."""
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def measure(self, name: str, value: float) -> None:
        self.measures.setdefault(name, Counter())[float(f"{value:.3g}")] += 1

    def add(self, other: Tally) -> None:
        """Add the counts of the rows that come next."""
        for name in ("samples", "usable", "kept", "captions"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, counts in other.measures.items():
            self.measures.setdefault(name, Counter()).update(counts)
        for name in ("formats", "languages", "broken", "dropped"):
            getattr(self, name).update(getattr(other, name))
        self.broken_named = (self.broken_named + other.broken_named)[:BROKEN_NAMED]
        for name, named in other.examples.items():
            self.examples[name] = (self.examples.get(name, []) + named)[:EXAMPLES]


@dataclass(frozen=True)
class _Look:
    """Counts over a block of rows."""

    source: Source
    data: DataSettings
    tried: Filters
    detector: Detector | None

    def __call__(self, rows: range) -> Tally:
        tally = Tally()
        for row in rows:
            self._sample(tally, row)
        return tally

    def _sample(self, tally: Tally, row: int) -> None:
        key = self.source.key(row)
        tally.samples += 1
        captions, refused = self._captions(tally, row, key)
        image, damaged = self._picture(tally, row, key)
        for reason in dict.fromkeys(filter(None, (refused, damaged))):
            tally.broken[_kind(reason)] += 1
            if len(tally.broken_named) < BROKEN_NAMED:
                tally.broken_named.append({"key": key, "reason": reason})
        if captions and image is not None:
            tally.usable += 1
            on = self.data.filters
            tally.kept += filter_captions(captions, on)[1] is None and not any(failed_picture_filters(image, on))

    def _captions(self, tally: Tally, row: int, key: str) -> tuple[list[str], str | None]:
        try:
            captions = self.source.captions(row)
        except BadSample as error:
            return [], str(error)
        tally.captions += len(captions)
        tally.measure("captions a picture", len(captions))
        for caption in captions:
            tally.measure("words a caption", len(caption.split()))
            tally.measure("characters a caption", len(caption))
            if self.detector is not None:
                tally.languages[self.detector(caption)] += 1
        refused = [set(failed_caption_filters(caption, self.tried)) for caption in captions]
        for name in CAPTION_MEASURES:
            if all(name in names for names in refused):
                self._drop(tally, name, key, captions[0])
        return captions, None

    def _picture(self, tally: Tally, row: int, key: str) -> tuple[Image.Image | None, str | None]:
        try:
            data = self.source.image_bytes(row)
            image = decode_image(data, self.data.max_pixels)
        except (BadSample, BadImage) as error:
            return None, str(error)
        tally.formats[_format(data)] += 1
        tally.measure("bytes a picture", len(data))
        tally.measure("width", image.width)
        tally.measure("height", image.height)
        tally.measure("shorter side", min(image.size))
        tally.measure("width / height", image.width / image.height)
        for name in failed_picture_filters(image, self.tried):
            self._drop(tally, name, key, f"{image.width} x {image.height}")
        return image, None

    def _drop(self, tally: Tally, name: str, key: str, shown: str) -> None:
        tally.dropped[name] += 1
        named = tally.examples.setdefault(name, [])
        if len(named) < EXAMPLES:
            named.append({"key": key, "shown": shown[:200]})


def scan(
    source: Source, data: DataSettings, image_size: int, *, workers: int, detector: Detector | None = None
) -> dict[str, Any]:
    """All there is to say of the source, as plain values that JSON can hold.

    Every filter is tried: at the recipe's value where it is on, else at a typical one (``with_typical_limits``).
    """
    tried = with_typical_limits(data.filters, image_size)
    tally = Tally()
    blocks = split_blocks(range(len(source)), _BLOCK)
    with progress("scan", len(source), "samples") as bar:
        for block, found in zip(blocks, map_blocks(_Look(source, data, tried, detector), blocks, workers), strict=True):
            tally.add(found)
            bar.advance(len(block))
    index = Counter(_kind(reason) for _, reason in source.skipped)
    return {
        "source": source.name,
        "format": source.format,
        "samples": tally.samples,
        "usable": tally.usable,
        "kept": tally.kept,
        "captions": tally.captions,
        "picture_formats": dict(tally.formats.most_common()),
        "measures": {name: _quantiles(counts) for name, counts in tally.measures.items()},
        "languages": dict(tally.languages.most_common()) if detector is not None else None,
        "broken": {
            "by_reason": dict(tally.broken.most_common()),
            "first": tally.broken_named,
            "left_out_by_the_index": dict(index.most_common()),
            "first_left_out_by_the_index": [{"key": k, "reason": r} for k, r in source.skipped[:BROKEN_NAMED]],
        },
        "filters": {
            name: {
                "value": getattr(tried, name),
                "on": getattr(data.filters, name) is not None,
                "drops": tally.dropped[name],
                "examples": tally.examples.get(name, []),
            }
            for name in (*CAPTION_MEASURES, *PICTURE_MEASURES)
        },
    }


def examples(source: Source, count: int, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """Pictures with their first captions, from rows that are spread evenly; those that cannot be read are left out."""
    n = len(source)
    for row in sorted({place * n // count for place in range(count)}):
        try:
            yield decode_image(source.image_bytes(row), max_pixels), source.captions(row)[0]
        except (BadSample, BadImage):
            continue


def _quantiles(counts: Counter[float]) -> dict[str, float]:
    """The value below or at which each share of ``QUANTILES`` lies, and the mean."""
    values, total = sorted(counts.items()), counts.total()
    found: dict[str, float] = {"mean": sum(value * count for value, count in values) / total}
    for percent in QUANTILES:
        rank, seen = max(1, -(-percent * total // 100)), 0
        for value, count in values:
            seen += count
            if seen >= rank:
                found[f"{percent}%"] = value
                break
    return found


def _kind(reason: str) -> str:
    """A reason without what is peculiar to one sample, to count by."""
    return reason.split(":")[0].split(" (")[0]


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return str(image.format)
