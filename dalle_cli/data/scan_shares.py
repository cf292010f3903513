"""A scan in shares (``dalle scan --shard I/N``), each by a job of its own; the last one adds up the counts of all."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.filters import with_typical_limits
from dalle_cli.data.language import LanguageDetector
from dalle_cli.data.scan import BLOCK, Counts, ScanResult, count_samples, summarise
from dalle_cli.data.source import Source
from dalle_cli.progress import log
from dalle_cli.stores.shards import Shard, join_names
from dalle_cli.stores.share_files import ShareFiles


def scan_share(
    source: Source,
    data: DataSettings,
    image_size: int,
    shard: Shard,
    folder: Path,
    workers: int,
    detector: LanguageDetector | None = None,
) -> ScanResult | None:
    """Count one share of a source into a file of ``folder``; return the statistics of all once every share is there.

    A share that is there already is not counted again.

    Raises:
        UserError: ``folder`` has shares of another source, of other filters or of another number, or a damaged one.
    """
    made_of = {
        "source": source.identity,
        "filters": data.filters.model_dump(mode="json"),
        "limits": with_typical_limits(data.filters, image_size).model_dump(mode="json"),
        "max_pixels": data.max_pixels,
        "languages": detector is not None,
    }
    files = ShareFiles(folder, shard.of, made_of, TypeAdapter(Counts))
    rows = shard.rows(len(source), BLOCK)
    # Counts are kept in the order of the samples, for equal files.
    found = files.read_with(shard, lambda: count_samples(source, rows, data, image_size, workers, detector))
    if missing := [each for each, there in found.items() if there is None]:
        log(f"scan: share {shard} is counted; still to be counted: {join_names(missing)}")
        return None
    whole = Counts()
    for each in found.values():
        assert each is not None
        whole.add(each)
    return summarise(source, whole, data, image_size)
