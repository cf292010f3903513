"""The data set of tokens: one Zarr v3 group that ``tokenize-text`` and ``encode-images`` fill side by side.

Row i is sample i of the source, in both parts, so that the two commands need not wait for each other:

- part ``text``: ``text`` (N, T) uint16, ``text_length`` (N,) uint16 (0: skipped), ``caption`` (N,) string, and with
  BPE dropout ``text_dropped`` (N, E, T) and ``text_dropped_length`` (N, E): E dropped versions of each caption;
- part ``image``: ``image`` (N, grid, grid) uint16, ``image_ok`` (N,) uint8 (0: skipped);
- ``key`` (N,) string, by whichever part comes first; the second checks that it reads the same samples.

A part grows by whole shards. Its count of committed rows, in the group's attributes, moves after the shard is written,
so a killed writer goes on at the last committed row and a reader never sees half a row.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.stores.files import explain_os_errors

FORMAT_VERSION = 1
ROWS_PER_SHARD = 4096
ROWS_PER_CHUNK = 256
Part = Literal["text", "image"]


def _group(path: Path, mode: Literal["r", "a"]) -> Any:
    import zarr

    try:
        return zarr.open_group(str(path), mode=mode, zarr_format=3)
    except (FileNotFoundError, ValueError, zarr.errors.GroupNotFoundError):
        raise UserError(f"{path}: is no token store; make one with tokenize-text and encode-images") from None


class PartWriter:
    """Appends whole shards of one part of a store; opens where the last run stopped.

    ``identity`` is what makes two runs the same work (source, hashes, sizes): a store begun with another one is
    refused.
    """

    def __init__(self, path: Path, part: Part, identity: Mapping[str, Any]) -> None:
        self.path, self.part = path, part
        with explain_os_errors(path):
            if path.exists() and any(path.iterdir()) and not (path / "zarr.json").is_file():
                raise UserError(f"{path}: exists and is no token store; choose another --tokens")
            self.group = _group(path, "a")
            for left in path.rglob("*.partial"):  # what a killed run was writing
                left.unlink()
            attributes = dict(self.group.attrs)
            if not attributes:
                self.group.attrs.update({"format": "dalle-tokens", "version": FORMAT_VERSION})
            elif attributes.get("format") != "dalle-tokens":
                raise UserError(f"{path}: is a Zarr group, but no token store; choose another --tokens")
            state = attributes.get(part)
            wanted = json.loads(json.dumps(dict(identity)))
            if state is None:
                state = {"rows": 0, "complete": False, "identity": wanted, "skipped": {}}
                self.group.attrs[part] = state
        for name, value in wanted.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"{path}: its {part} part was made with {name} {state['identity'].get(name)!r}, "
                    f"now {value!r}; choose another --tokens, or delete the store to begin again"
                )
        self.state: dict[str, Any] = state
        other: Part = "image" if part == "text" else "text"
        self._other_rows = int(attributes.get(other, {}).get("rows", 0))
        self._keys_from_other = attributes.get("keys_by", part) != part
        if self._keys_from_other and not attributes[other]["complete"]:
            raise UserError(f"{path}: its {other} part is unfinished; finish that command first, then run this one")
        if "keys_by" not in attributes:
            self.group.attrs["keys_by"] = part

    @property
    def rows(self) -> int:
        """Committed rows; the next sample to handle."""
        return int(self.state["rows"])

    @property
    def complete(self) -> bool:
        return bool(self.state["complete"])

    def check_source(self, samples: int) -> None:
        """Refuse to go on, or to call it done, when the source has changed its size since the first run."""
        if self.rows > samples or (self.complete and self.rows != samples):
            raise UserError(
                f"{self.path}: its {self.part} part has {self.rows} rows, the source now {samples} samples; "
                "choose another --tokens, or delete the store to begin again"
            )

    def append(self, keys: list[str], arrays: Mapping[str, np.ndarray], skipped: Mapping[str, str]) -> None:
        """Write and commit one block of rows: a whole shard, or the last.

        ``arrays`` are (rows, ...) by name; string arrays have numpy's object dtype. ``skipped`` gives the reason for
        each key in the block that holds no data.
        """
        start, stop = self.rows, self.rows + len(keys)
        with explain_os_errors(self.path):
            if self._keys_from_other:
                self._check_keys(keys, start)
            else:
                arrays = {"key": np.array(keys, dtype=object), **arrays}
            for name, values in arrays.items():
                self._array(name, values)[start:stop] = values
            counts = dict(self.state["skipped"])
            for reason in skipped.values():
                counts[reason] = counts.get(reason, 0) + 1
            self._write_skips(start, skipped)
            self.state = {**self.state, "rows": stop, "skipped": dict(sorted(counts.items()))}
            self.group.attrs[self.part] = self.state

    def finish(self) -> None:
        """Mark the part as whole."""
        if self._keys_from_other and self.rows != self._other_rows:
            raise UserError(f"{self.path}: the source has {self.rows} samples, the store {self._other_rows} rows")
        with explain_os_errors(self.path):
            self.state = {**self.state, "complete": True}
            self.group.attrs[self.part] = self.state

    def _array(self, name: str, values: np.ndarray) -> Any:
        rows = self.rows + len(values)
        if name in self.group:
            array = self.group[name]
            if array.shape[0] != rows:
                array.resize((rows, *array.shape[1:]))
            return array
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that its string type has no frozen specification yet
            return self.group.create_array(
                name,
                shape=(rows, *values.shape[1:]),
                chunks=(ROWS_PER_CHUNK, *values.shape[1:]),
                shards=(ROWS_PER_SHARD, *values.shape[1:]),
                dtype="str" if values.dtype == object else values.dtype,
            )

    def _check_keys(self, keys: list[str], start: int) -> None:
        known = [str(key) for key in self.group["key"][start : start + len(keys)]]
        if known != keys:
            row = next((i for i, (a, b) in enumerate(zip(known, keys, strict=False)) if a != b), len(known))
            there = repr(known[row]) if row < len(known) else "no more rows"
            raise UserError(
                f"{self.path}: row {start + row} is {there} in the store and {keys[row]!r} in the source; "
                "both commands must read the same source"
            )

    def _write_skips(self, start: int, skipped: Mapping[str, str]) -> None:
        """Append to the part's report; what a killed run wrote beyond the committed rows is cut off first."""
        report = self.path / f"skipped-{self.part}.jsonl"
        lines = report.read_text().splitlines() if report.is_file() else []
        kept = sum(self.state["skipped"].values())
        lines = lines[:kept] + [json.dumps({"key": key, "reason": reason}) for key, reason in skipped.items()]
        if lines:
            report.write_text("\n".join(lines) + "\n")


class TokenReader:
    """Random reads of a store's committed rows; keeps the last decoded shards in memory."""

    def __init__(self, path: Path, cached_shards: int = 64) -> None:
        """Raises UserError when ``path`` is no token store or a part that training needs is missing."""
        self.path = path
        self._group = _group(path, "r")
        self.attributes: dict[str, Any] = dict(self._group.attrs)
        if self.attributes.get("format") != "dalle-tokens":
            raise UserError(f"{path}: is no token store; make one with tokenize-text and encode-images")
        if int(self.attributes["version"]) > FORMAT_VERSION:
            raise UserError(f"{path}: its format is newer than this dalle reads; upgrade dalle")
        self._cached_shards = cached_shards
        self._cache: dict[tuple[str, int], np.ndarray] = {}

    def part(self, part: Part) -> dict[str, Any]:
        """State of a part: ``rows``, ``complete``, ``identity``, ``skipped``.

        Raises:
            UserError: the store has no such part yet.
        """
        command = {"text": "tokenize-text", "image": "encode-images"}[part]
        if part not in self.attributes:
            raise UserError(f"{self.path}: has no {part} part yet; run dalle {command} on it first")
        state: dict[str, Any] = self.attributes[part]
        return state

    def __len__(self) -> int:
        """Rows that every part present has committed."""
        return min(int(self.attributes[p]["rows"]) for p in ("text", "image") if p in self.attributes)

    def require_complete(self) -> None:
        """Refuse a store that a command is still writing or left unfinished."""
        for part, command in (("text", "tokenize-text"), ("image", "encode-images")):
            if not self.part(part)["complete"]:  # type: ignore[arg-type]
                raise UserError(
                    f"{self.path}: its {part} part stops at row {self.part(part)['rows']}; "  # type: ignore[arg-type]
                    f"run dalle {command} again to finish it"
                )

    def usable(self) -> np.ndarray:
        """Rows that hold both a caption and a picture, ascending, int64."""
        n = len(self)
        ok = (self._group["text_length"][:n] > 0) & (self._group["image_ok"][:n] > 0)
        return np.flatnonzero(ok)

    @property
    def dropped_versions(self) -> int:
        """Number of BPE-dropped versions of each caption."""
        return int(self._group["text_dropped"].shape[1]) if "text_dropped" in self._group else 0

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Values of the array ``name`` at ``rows`` (any order), shape (len(rows), ...)."""
        shards = rows // ROWS_PER_SHARD
        out: np.ndarray | None = None
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            values = self._shard(name, int(shard))[rows[at] - shard * ROWS_PER_SHARD]
            if out is None:
                out = np.empty((len(rows), *values.shape[1:]), values.dtype)
            out[at] = values
        if out is None:
            array = self._group[name]
            return np.empty((0, *array.shape[1:]), array.dtype)
        return out

    def strings(self, name: Literal["key", "caption"], rows: Iterable[int]) -> list[str]:
        """Strings at ``rows``."""
        return [str(value) for value in self.read(name, np.asarray(list(rows), dtype=np.int64))]

    def _shard(self, name: str, shard: int) -> np.ndarray:
        key = (name, shard)
        found = self._cache.pop(key, None)
        if found is None:
            start = shard * ROWS_PER_SHARD
            found = np.asarray(self._group[name][start : start + ROWS_PER_SHARD])
        self._cache[key] = found
        while len(self._cache) > self._cached_shards:
            self._cache.pop(next(iter(self._cache)))
        return found
