"""CLIP scores of samples, kept in their store, and the store's samples as lines of ``dalle sample``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.stores.checksums import write_checksums
from dalle_cli.stores.files import locked, new_directory
from dalle_cli.stores.samples import (
    STORE,
    ManifestLines,
    SampleAttributes,
    read_attributes,
    request_rows,
    require_version,
    run_of_store,
)
from dalle_cli.stores.shards import WHOLE, parse_shard

CLIP_SCORE = "clip_score"
"""Name of the array (rows,) float64, NaN for a sample without a score; its attribute ``scorer`` names the CLIP."""

ROWS_AT_ONCE = 4096
"""Number of rows whose likelihoods are read together; zarr takes about 3,000 bytes for each chunk that it reads."""


def sample_stores(path: Path) -> list[Path]:
    """Return the sample stores at ``path``, which may be a store, its folder, or the folder of a request's shares."""
    for store in (path, path / STORE):
        if store.name == STORE and (store / "zarr.json").is_file():
            return [store]
    return sorted(file.parent for file in path.glob(f"*/{STORE}/zarr.json")) if path.is_dir() else []


def store_lines(store: Path) -> Iterator[dict[str, Any]]:
    """Return the committed samples of a store as ``dalle sample`` prints them, with ``score`` and ``scorer`` if known.

    Attributes and scores are read at once, and each line is made when its turn comes.

    Raises:
        UserError: the store cannot be read, or holds no sample yet.
    """
    group = _open(store)
    with _explained(store):
        found = read_attributes(group, store)
        if not found.rows:
            raise UserError(f"{store}: holds no sample yet; run dalle sample again to resume it")
        return _lines(store, group, found, *_scores(group))


def _lines(
    store: Path, group: Any, found: SampleAttributes, scores: np.ndarray | None, scorer: str
) -> Iterator[dict[str, Any]]:
    request = found.request
    with _explained(store):
        elsewhere = run_of_store(store, group.attrs)
        shard = WHOLE if request.shard is None else parse_shard(request.shard)
        start = request_rows(shard, len(request.prompts), request.n).start
        lines = ManifestLines(store, request.prompts, request.seed, found.in_folders)
        for row in range(found.rows):
            if row % ROWS_AT_ONCE == 0:
                likelihood = group["log_likelihood"][row : min(row + ROWS_AT_ONCE, found.rows)]
            prompt, index = divmod(start + row, request.n)
            index += request.first
            line = lines.line(row, prompt, index, likelihood[row % ROWS_AT_ONCE]) | elsewhere
            if scores is not None and not np.isnan(scores[row]):
                line |= {"score": float(scores[row]), "scorer": scorer}
            yield line


@contextmanager
def _explained(store: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # zarr and its codecs raise errors of many kinds
        raise UserError(f"{store}: is no store of dalle sample, or damaged ({error!r})") from None


def write_scores(store: Path, rows: Sequence[int], scores: Sequence[float], scorer: str) -> None:
    """Add the scores of ``rows`` to a sample store; its scores by the same CLIP are kept, those by another are dropped.

    Of two scores of one row the last one counts.

    The array is written beside the old one and renamed into its place. Processes that score parts of the same store
    wait for one another.

    Raises:
        UserError: the store is missing or may not be written, or has no such row.
    """
    import zarr
    from zarr.codecs import ZstdCodec

    if not (store / "zarr.json").is_file():
        raise UserError(
            f"{store}: cannot be opened as a store of dalle sample; give the lines of samples that are there"
        )
    place = store.resolve()
    with locked(place.with_name(f".{place.name}.lock"), f"{store}:"):
        group = _open(store)
        with _explained(store):
            total = int(group["log_likelihood"].shape[0])
            known, known_scorer = _scores(group)
            if known is not None and known.shape != (total,):
                raise ValueError(f"its {CLIP_SCORE} has another number of rows")
        if not all(0 <= row < total for row in rows):
            raise UserError(f"{store}: has {total} rows and no row {max(rows)}; give the lines of this store")
        values = known if known is not None and known_scorer == scorer else np.full(total, np.nan)
        values[np.asarray(rows, np.int64)] = np.asarray(scores)
        with new_directory(store / CLIP_SCORE) as folder:
            array = zarr.create_array(
                str(folder),
                data=values,
                chunks=(total,),
                zarr_format=3,
                overwrite=True,
                compressors=ZstdCodec(checksum=True),
                config={"write_empty_chunks": True},
            )
            array.attrs["scorer"] = scorer
            write_checksums(folder, ["zarr.json"])


def _scores(group: Any) -> tuple[np.ndarray | None, str]:
    if CLIP_SCORE not in group:
        return None, ""
    array = group[CLIP_SCORE]
    return array[:], str(array.attrs["scorer"])


def _open(store: Path) -> Any:
    import zarr

    try:
        group = zarr.open_group(str(store), mode="r", zarr_format=3)
    except Exception as error:
        raise UserError(f"{store}: cannot be read as a store of dalle sample ({error})") from None
    require_version(group.attrs, store)
    return group
