"""Statistics of a source before training: sizes, captions, broken samples, and what each filter would drop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

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
from dalle_cli.data.images import BadImage, decode_image, read_header
from dalle_cli.data.language import LanguageDetector
from dalle_cli.data.read_ahead import on_server, rows_ahead
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import map_blocks, split_blocks
from dalle_cli.progress import progress

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
"""Reported quantiles, in per cent."""
EXAMPLES_PER_FILTER = 3
BROKEN_EXAMPLES = 20
BLOCK = 32
"""Number of rows that a process counts at a time."""


@dataclass(frozen=True)
class BrokenSample:
    """A sample that cannot be used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class BrokenSamples:
    """Samples that cannot be used, because reading them failed or because the source's index left them out."""

    by_reason: dict[str, int]
    first: list[BrokenSample]
    left_out_by_the_index: dict[str, int]
    first_left_out_by_the_index: list[BrokenSample]


@dataclass(frozen=True)
class FilterExample:
    """A sample that a filter would drop, with its first caption or its picture's size."""

    key: str
    shown: str


@dataclass(frozen=True)
class FilterStatistics:
    """The samples that a filter would drop by itself."""

    value: float | str
    """The recipe's limit where the filter is on, else a typical one; ``language`` has no typical one."""
    on: bool
    drops: int
    """Number of samples whose picture, or whose every caption, fails the filter."""
    examples: list[FilterExample]


@dataclass(frozen=True)
class ScanResult:
    """Statistics of a source; ``dataclasses.asdict`` gives the contents of scan.json."""

    source: str
    format: str
    samples: int
    usable: int
    """Samples whose picture and caption can be read, before any filter."""
    kept: int
    """Usable samples that pass the recipe's filters."""
    captions: int
    picture_formats: dict[str, int]
    measures: dict[str, dict[str, float]]
    """Mean and QUANTILES ("5%") of each measure."""
    languages: dict[str, int] | None
    """Captions by language, most frequent first; None without a detector or a caption."""
    broken: BrokenSamples
    filters: dict[str, FilterStatistics]


@dataclass
class Counts:
    """Counts over some rows, to which those of other rows can be added; values have three significant digits."""

    samples: int = 0
    usable: int = 0
    kept: int = 0
    captions: int = 0
    measures: dict[str, Counter[float]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    broken_examples: list[BrokenSample] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[FilterExample]] = field(default_factory=dict)

    def measure(self, name: str, value: float) -> None:
        self.measures.setdefault(name, Counter())[float(f"{value:.3g}")] += 1

    def drop(self, name: str, key: str, shown: str) -> None:
        self.dropped[name] += 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < EXAMPLES_PER_FILTER:
            examples.append(FilterExample(key, shown[:200]))

    def add(self, other: Counts) -> None:
        """Add the counts of the following rows."""
        for name in ("samples", "usable", "kept", "captions"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, counts in other.measures.items():
            self.measures.setdefault(name, Counter()).update(counts)
        for name in ("formats", "languages", "broken", "dropped"):
            getattr(self, name).update(getattr(other, name))
        self.broken_examples = (self.broken_examples + other.broken_examples)[:BROKEN_EXAMPLES]
        for name, examples in other.examples.items():
            self.examples[name] = (self.examples.get(name, []) + examples)[:EXAMPLES_PER_FILTER]


@dataclass(frozen=True)
class _BlockScan:
    """Counts the samples of a block of rows."""

    source: Source
    data: DataSettings
    tried: Filters
    detector: LanguageDetector | None

    def __call__(self, rows: range) -> Counts:
        counts = Counts()
        for row in rows_ahead(self.source, rows, "both"):
            self._scan_sample(counts, row)
        return counts

    def _scan_sample(self, counts: Counts, row: int) -> None:
        key = self.source.key(row)
        counts.samples += 1
        captions, caption_error = self._scan_captions(counts, row, key)
        image, picture_error = self._scan_picture(counts, row, key)
        for reason in dict.fromkeys(filter(None, (caption_error, picture_error))):
            counts.broken[_category(reason)] += 1
            if len(counts.broken_examples) < BROKEN_EXAMPLES:
                counts.broken_examples.append(BrokenSample(key, reason))
        if captions and image is not None:
            counts.usable += 1
            filters = self.data.filters
            passes = filter_captions(captions, filters)[1] is None and not any(failed_picture_filters(image, filters))
            counts.kept += passes

    def _scan_captions(self, counts: Counts, row: int, key: str) -> tuple[list[str], str | None]:
        """Return the captions, and the error if they cannot be read."""
        try:
            captions = self.source.captions(row)
        except BadSample as error:
            return [], str(error)
        counts.captions += len(captions)
        counts.measure("captions a picture", len(captions))
        for caption in captions:
            counts.measure("words a caption", len(caption.split()))
            counts.measure("characters a caption", len(caption))
            if self.detector is not None:
                counts.languages[self.detector(caption)] += 1
        failed = [set(failed_caption_filters(caption, self.tried)) for caption in captions]
        for name in CAPTION_MEASURES:
            if all(name in names for names in failed):
                counts.drop(name, key, captions[0])
        return captions, None

    def _scan_picture(self, counts: Counts, row: int, key: str) -> tuple[Image.Image | None, str | None]:
        """Return the picture, or the error if it cannot be read."""
        try:
            data = self.source.image_bytes(row)
            image = decode_image(data, self.data.max_pixels)
        except (BadSample, BadImage) as error:
            return None, str(error)
        counts.formats[read_header(data).format] += 1
        counts.measure("bytes a picture", len(data))
        counts.measure("width", image.width)
        counts.measure("height", image.height)
        counts.measure("shorter side", min(image.size))
        counts.measure("width / height", image.width / image.height)
        counts.measure("share cropped away", 1 - min(image.size) / max(image.size))
        for name in failed_picture_filters(image, self.tried):
            counts.drop(name, key, f"{image.width} x {image.height}")
        return image, None


def scan(
    source: Source, data: DataSettings, image_size: int, *, workers: int, detector: LanguageDetector | None = None
) -> ScanResult:
    """Read every sample of a source and return its statistics.

    Every filter is tried, one that is off in ``data`` with the limit of ``with_typical_limits``.
    """
    counts = count_samples(source, range(len(source)), data, image_size, workers, detector)
    return summarise(source, counts, data, image_size)


def count_samples(
    source: Source,
    rows: range,
    data: DataSettings,
    image_size: int,
    workers: int,
    detector: LanguageDetector | None = None,
) -> Counts:
    """Read ``rows`` of a source and count what ``summarise`` makes statistics of."""
    tried, counts = with_typical_limits(data.filters, image_size), Counts()
    blocks = split_blocks(rows, BLOCK)
    with progress("scan", len(rows), "samples") as bar:
        scans = map_blocks(_BlockScan(source, data, tried, detector), blocks, workers, afresh=on_server(source))
        for block, found in zip(blocks, scans, strict=True):
            counts.add(found)
            bar.advance(len(block))
    return counts


def summarise(source: Source, counts: Counts, data: DataSettings, image_size: int) -> ScanResult:
    """Return the statistics of a source, of which every sample was counted."""
    tried = with_typical_limits(data.filters, image_size)
    left_out = Counter(_category(reason) for _, reason in source.skipped)
    return ScanResult(
        source=source.name,
        format=source.format,
        samples=counts.samples,
        usable=counts.usable,
        kept=counts.kept,
        captions=counts.captions,
        picture_formats=dict(counts.formats.most_common()),
        measures={name: quantiles(values) for name, values in counts.measures.items()},
        languages=dict(counts.languages.most_common()) or None,
        broken=BrokenSamples(
            by_reason=dict(counts.broken.most_common()),
            first=counts.broken_examples,
            left_out_by_the_index=dict(left_out.most_common()),
            first_left_out_by_the_index=[BrokenSample(*skipped) for skipped in source.skipped[:BROKEN_EXAMPLES]],
        ),
        filters={
            name: FilterStatistics(
                value=getattr(tried, name),
                on=getattr(data.filters, name) is not None,
                drops=counts.dropped[name],
                examples=counts.examples.get(name, []),
            )
            for name in (*CAPTION_MEASURES, *PICTURE_MEASURES)
            if getattr(tried, name) is not None
        },
    )


def examples(source: Source, count: int, max_pixels: int) -> Iterator[tuple[Image.Image, str]]:
    """Yield up to ``count`` pictures from evenly spaced rows, each with its first caption; skip unreadable samples."""
    n = len(source)
    for row in sorted({place * n // count for place in range(count)}):
        try:
            yield decode_image(source.image_bytes(row), max_pixels), source.captions(row)[0]
        except (BadSample, BadImage):
            continue


def quantiles(counts: Counter[float]) -> dict[str, float]:
    """Return the mean and QUANTILES of values by their counts: the least value that p % of all values do not exceed."""
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


def _category(reason: str) -> str:
    """Return a reason without the part that is specific to one sample, so that reasons can be counted."""
    return reason.split(":")[0].split(" (")[0]
