"""Reading a sample store back as the lines of its manifest, and keeping CLIP's scores in it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.stores.files import new_directory
from dalle_cli.stores.samples import STORE, manifest_line, request_rows
from dalle_cli.stores.shards import WHOLE, parse_shard

CLIP_SCORE = "clip_score"
"""Array (rows,) float64, NaN where a sample has no score; its attribute ``scorer`` names the CLIP."""


def sample_stores(path: Path) -> list[Path]:
    """The sample stores that ``path`` names: one, its folder, or the folder of a request's shards; else none."""
    for store in (path, path / STORE):
        if store.name == STORE and (store / "zarr.json").is_file():
            return [store]
    return sorted(file.parent for file in path.glob(f"*/{STORE}/zarr.json")) if path.is_dir() else []


def store_lines(store: Path) -> list[dict[str, Any]]:
    """The committed samples of a store as ``dalle sample`` prints them, with ``score`` and ``scorer`` if it has them.

    Raises:
        UserError: it cannot be read, or holds no sample yet.
    """
    group = _open(store)
    try:
        request, committed = group.attrs["request"], int(group.attrs["rows"])
        prompts, n, first = request["prompts"], int(request["settings"]["n"]), int(request.get("first", 0))
        likelihood = group["log_likelihood"][:committed]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{store}: is no store of dalle sample ({error!r})") from None
    if not committed:
        raise UserError(f"{store}: holds no sample yet; run dalle sample again to go on with it")
    shard = parse_shard(request["shard"]) if "shard" in request else WHOLE
    start = request_rows(shard, len(prompts), n).start
    scores, scorer = _scores(group)
    lines = []
    for row in range(committed):
        prompt, index = divmod(start + row, n)
        line = manifest_line(store, row, prompts, prompt, first + index, request["seed"], likelihood[row])
        if scores is not None and not np.isnan(scores[row]):
            line |= {"score": float(scores[row]), "scorer": scorer}
        lines.append(line)
    return lines


def write_scores(store: Path, scores: Mapping[int, float], scorer: str) -> None:
    """Keep the scores of some rows in the store, beside those it has of the same scorer; another's are replaced.

    The array is written beside the old one and renamed into its place. Processes that score parts of one store wait
    for one another.

    Raises:
        UserError: the store is missing, or may not be written.
    """
    import zarr

    with _locked(store):
        group = _open(store)
        rows = int(group["log_likelihood"].shape[0])
        if not all(0 <= row < rows for row in scores):
            raise UserError(f"{store}: has {rows} rows, not row {max(scores)}: these lines are of another store")
        kept, named = _scores(group)
        values = kept if kept is not None and named == scorer else np.full(rows, np.nan)
        values[list(scores)] = list(scores.values())
        with new_directory(store / CLIP_SCORE) as folder:
            array = zarr.create_array(str(folder), data=values, chunks=(rows,), zarr_format=3, overwrite=True)
            array.attrs["scorer"] = scorer


def _scores(group: Any) -> tuple[np.ndarray | None, str]:
    if CLIP_SCORE not in group:
        return None, ""
    array = group[CLIP_SCORE]
    return array[:], str(array.attrs["scorer"])


def _open(store: Path) -> Any:
    import zarr

    try:
        return zarr.open_group(str(store), mode="r", zarr_format=3)
    except Exception as error:
        raise UserError(f"{store}: cannot be read as a store of dalle sample ({error})") from None


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    try:
        folder = os.open(store, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{store}: cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
