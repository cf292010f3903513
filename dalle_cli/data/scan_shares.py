"""A scan in shares (``dalle scan --shard I/N``), each by a job of its own; the last one adds up the counts of all."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.filters import with_typical_limits
from dalle_cli.data.language import LanguageDetector
from dalle_cli.data.scan import BLOCK, Counts, ScanResult, count_samples, summarise
from dalle_cli.data.source import Source
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import explain_os_errors, write_atomically
from dalle_cli.stores.shards import Shard, join_names

_COUNTS = TypeAdapter(Counts)


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
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = (re.fullmatch(r"\d+-of-(\d+)\.json", file.name) for file in folder.iterdir())
    if {int(name[1]) for name in names if name is not None} - {shard.of}:
        raise UserError(f"{folder}: holds shares of another number than {shard.of}; delete it, or name another --out")
    shards = [Shard(number, shard.of) for number in range(1, shard.of + 1)]
    found = {each: _read(folder, each, made_of) for each in shards}
    if found[shard] is None:
        own = count_samples(source, shard.rows(len(source), BLOCK), data, image_size, workers, detector)
        counts = _COUNTS.dump_python(own, mode="json")
        line = {"made_of": made_of, "sha256": _sha256(counts), "counts": counts}
        write_atomically(_file(folder, shard), json.dumps(line))  # in the order of the samples, for equal counts
        # Others may have been counted meanwhile.
        found |= {each: _read(folder, each, made_of) for each in shards}
    if missing := [each for each, there in found.items() if there is None]:
        log(f"scan: share {shard} is counted; still to be counted: {join_names(missing)}")
        return None
    whole = Counts()
    for each in found.values():
        assert each is not None
        whole.add(each)
    return summarise(source, whole, data, image_size)


def _file(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.number:04d}-of-{shard.of:04d}.json"


def _sha256(counts: Any) -> str:
    return hashlib.sha256(json.dumps(counts).encode()).hexdigest()


def _read(folder: Path, shard: Shard, made_of: dict[str, Any]) -> Counts | None:
    """Return the counts of a share, or None if it is not there."""
    file = _file(folder, shard)
    if not file.is_file():
        return None
    try:
        with explain_os_errors(file):
            found = json.loads(file.read_bytes())
        there, counts = dict(found["made_of"]), _COUNTS.validate_python(found["counts"])
        if found["sha256"] != _sha256(found["counts"]):
            raise ValueError("its counts are not those that were written")
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = type(error).__name__
        raise UserError(f"{file}: is damaged ({reason}); delete it and scan share {shard} again") from None
    if different := [name for name, value in made_of.items() if there.get(name) != value]:
        raise UserError(f"{file}: was counted with other {different[0]}; scan all shares alike, or delete {folder}")
    return counts
