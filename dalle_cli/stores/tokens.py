"""The data set of tokens: one Zarr v3 group that ``tokenize-text`` and ``encode-images`` fill side by side.

Row i is sample i of the source, in both parts, so that the two commands need not wait for each other:

- part ``text``: ``text`` (N, T) uint16, ``text_length`` (N,) uint16 (0: skipped), ``caption`` (N,) string: each
  picture's first caption. With BPE dropout or several captions a picture also ``text_epochs`` (N, E, T) uint16,
  ``text_epochs_length`` (N, E) uint16 and ``text_versions`` (N,) uint16: what training sees at epoch e is version
  e mod ``text_versions``, or ``text`` where that is 0. ``more_captions`` (N,) string are JSON lists of the other
  captions, "" for none. These four are there only if they are needed;
- part ``image``: ``image`` (N, grid, grid) uint16, ``image_ok`` (N,) uint8 (0: skipped);
- ``key`` (N,) string, by whichever part comes first; the second checks that it reads the same samples.

A part grows by whole shards. Its count of committed rows, in the group's attributes, moves after the shard is written,
so a killed writer goes on at the last committed row and a reader never sees half a row.

Several processes make a part as shares, each in a store of its own (``stores/shards.py``), that ``dalle merge`` joins.
"""

from __future__ import annotations

import json
import math
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.stores.files import explain_os_errors
from dalle_cli.stores.shards import COMMANDS, WHOLE, Part, Shard

FORMAT_VERSION = 2
"""1 knew one caption a picture and kept its dropped versions in one array, read whole."""
ROWS_PER_SHARD = 4096
ROWS_PER_CHUNK = 256
CACHED_ROWS = 2**20
ZSTD_LEVEL = 1
"""The default level takes twice the time, and makes captions 10% smaller and tokens no smaller."""
MOST_REASONS = 100
"""Kinds of skips counted by name in a store's attributes; later ones are counted together. The report has them all."""
OTHER_REASONS = "other reasons"
BY_VERSION = ("text_epochs", "text_epochs_length")
"""Arrays whose second axis is chunked by one, so that an epoch reads its own version only."""


def _group(path: Path, mode: Literal["r", "a"]) -> Any:
    import zarr

    try:
        return zarr.open_group(str(path), mode=mode, zarr_format=3)
    except (FileNotFoundError, ValueError, zarr.errors.GroupNotFoundError):
        raise UserError(f"{path}: is no token store; make one with tokenize-text and encode-images") from None


def _check_version(path: Path, attributes: Mapping[str, Any]) -> None:
    version = int(attributes["version"])
    if version > FORMAT_VERSION:
        raise UserError(f"{path}: its format is newer than this dalle reads; upgrade dalle")
    if version < FORMAT_VERSION:
        raise UserError(
            f"{path}: was made by an older dalle, in format {version}; delete it and make it again with tokenize-text "
            "and encode-images"
        )


class PartWriter:
    """Appends whole shards of one part of a store; opens where the last run stopped.

    ``identity`` is what makes two runs the same work (source, hashes, sizes): a store begun with another one is
    refused. With ``shard`` its share of the rows goes to a store beside ``path``, which ``self.path`` then names::

        writer = PartWriter(path, "text", identity, shard)
        todo = writer.check_source(len(source))
        for start in range(todo.start, todo.stop, ROWS_PER_SHARD):
            rows = range(start, min(start + ROWS_PER_SHARD, todo.stop))
            writer.append([source.key(row) for row in rows], ...)
        writer.finish()
    """

    def __init__(self, path: Path, part: Part, identity: Mapping[str, Any], shard: Shard = WHOLE) -> None:
        self.part, self.shard = part, shard
        self.path = path = shard.store(path, part)
        with explain_os_errors(path):
            # A run killed at once leaves no more than the beginning of a zarr.json.
            others = path.exists() and any(not p.match("zarr.json.*.partial") for p in path.iterdir())
            if others and not (path / "zarr.json").is_file():
                raise UserError(f"{path}: exists and is no token store; choose another --tokens")
            self.group = _group(path, "a")
            for left in path.rglob("*.partial"):  # what a killed run was writing
                left.unlink()
            attributes = dict(self.group.attrs)
            if not attributes:
                self.group.attrs.update({"format": "dalle-tokens", "version": FORMAT_VERSION})
            elif attributes.get("format") != "dalle-tokens":
                raise UserError(f"{path}: is a Zarr group, but no token store; choose another --tokens")
            else:
                _check_version(path, attributes)
        wanted = json.loads(json.dumps(dict(identity)))
        begun = part in attributes
        state = attributes.get(part, {"rows": 0, "complete": False, "identity": wanted, "skipped": {}})
        for name, value in wanted.items():
            if state["identity"].get(name) != value:
                raise UserError(
                    f"{path}: its {part} part was made with {name} {state['identity'].get(name)!r}, "
                    f"now {value!r}; choose another --tokens, or delete the store to begin again"
                )
        self.state: dict[str, Any] = state
        self._opened: dict[str, Any] = {}
        other: Part = "image" if part == "text" else "text"
        self._other_rows = int(attributes.get(other, {}).get("rows", 0))
        self.keys_from_other = attributes.get("keys_by", part) != part
        if self.keys_from_other and not attributes[other]["complete"]:
            raise UserError(f"{path}: its {other} part is unfinished; finish that command first, then run this one")
        with explain_os_errors(path):
            if not begun:
                self.group.attrs[part] = state
            if "keys_by" not in attributes:
                self.group.attrs["keys_by"] = part
            self._cut_report()

    @property
    def rows(self) -> int:
        """Committed rows of this store."""
        return int(self.state["rows"])

    @property
    def _report(self) -> Path:
        return self.path / f"skipped-{self.part}.jsonl"

    @property
    def complete(self) -> bool:
        return bool(self.state["complete"])

    def check_source(self, samples: int) -> range:
        """The source's rows that are still to be appended, by whole shards.

        Raises:
            UserError: the source has changed its size since the first run.
        """
        share = self.shard.rows(samples, ROWS_PER_SHARD)
        if self.shard != WHOLE:
            wanted = {**asdict(self.shard), "samples": samples, "rows": [share.start, share.stop]}
            found = self.group.attrs.get("shard", wanted)
            if found != wanted:
                raise UserError(
                    f"{self.path}: was begun as shard {found['number']}/{found['of']} of {found['samples']} samples, "
                    f"now {self.shard} of {samples}; delete it to begin again"
                )
            with explain_os_errors(self.path):
                self.group.attrs["shard"] = wanted
        elif self.rows > samples or (self.complete and self.rows != samples):
            raise UserError(
                f"{self.path}: its {self.part} part has {self.rows} rows, the source now {samples} samples; "
                "choose another --tokens, or delete the store to begin again"
            )
        return range(share.start + self.rows, share.stop)

    def append(
        self,
        keys: list[str],
        arrays: Mapping[str, np.ndarray],
        skipped: Mapping[str, str],
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Write and commit one block of rows: whole shards, or the last.

        ``arrays`` are (rows, ...) by name; string arrays have numpy's object dtype. An array may come up in a later
        block only, or be wider in it: earlier rows are then filled with zeros. ``skipped`` gives the reason for each
        key in the block that holds no data; ``counts`` are added up in the part's state.
        """
        start, stop = self.rows, self.rows + len(keys)
        with explain_os_errors(self.path):
            if self.keys_from_other:
                self.check_keys(keys, start)
            else:
                arrays = {"key": np.array(keys, dtype=object), **arrays}
            for name, values in arrays.items():
                self._array(name, values)[(slice(start, stop), *map(slice, values.shape[1:]))] = values
            self.commit(stop, skipped.items(), counts)

    def commit(self, rows: int, skipped: Iterable[tuple[str, str]], more: Mapping[str, int] | None = None) -> None:
        """Move the count of committed rows, the arrays being written; ``skipped`` are the new rows' (key, reason),
        ``more`` is added to the part's ``counts``.
        """
        counts: dict[str, int] = dict(self.state["skipped"])
        lines = []
        for key, reason in skipped:
            lines.append(json.dumps({"key": key, "reason": reason}) + "\n")
            kind = reason.partition(" (")[0]  # what stands in brackets is of this sample alone
            kind = kind if kind in counts or len(counts) < MOST_REASONS else OTHER_REASONS
            counts[kind] = counts.get(kind, 0) + 1
        with explain_os_errors(self.path):
            if lines:
                with self._report.open("a") as report:
                    report.writelines(lines)
            self.state = {**self.state, "rows": rows, "skipped": dict(sorted(counts.items()))}
            if more:
                old: dict[str, int] = self.state.get("counts", {})
                self.state["counts"] = {name: old.get(name, 0) + more.get(name, 0) for name in sorted({*old, *more})}
            self.group.attrs[self.part] = self.state

    def finish(self) -> None:
        """Mark the part as whole."""
        if self.keys_from_other and self.rows != self._other_rows:
            raise UserError(f"{self.path}: the source has {self.rows} samples, the store {self._other_rows} rows")
        with explain_os_errors(self.path):
            for name in (*BY_VERSION, "text_versions", "more_captions"):
                if self.part == "text" and name in self.group and self.group[name].shape[0] != self.rows:
                    self.group[name].resize((self.rows, *self.group[name].shape[1:]))
            self.state = {**self.state, "complete": True}
            self.group.attrs[self.part] = self.state

    def _array(self, name: str, values: np.ndarray) -> Any:
        import zarr

        rows = self.rows + len(values)
        if name not in self._opened:
            # To look for empty chunks takes as long as to write them; only versions have many.
            with zarr.config.set({"array.write_empty_chunks": name not in BY_VERSION}):
                self._opened[name] = self.group[name] if name in self.group else self._new_array(name, values)
        array = self._opened[name]
        shape = (rows, *map(max, array.shape[1:], values.shape[1:]))
        if array.shape != shape:
            array.resize(shape)
        return array

    def _new_array(self, name: str, values: np.ndarray) -> Any:
        from zarr.codecs import ZstdCodec

        rest = values.shape[1:]
        shard = (ROWS_PER_SHARD, *rest)
        chunk = shard  # read whole, and each chunk costs time
        if name in BY_VERSION:
            chunk, shard = (ROWS_PER_CHUNK, 1, *rest[1:]), (ROWS_PER_SHARD, 1, *rest[1:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that its string type has no frozen specification yet
            return self.group.create_array(
                name,
                shape=(self.rows + len(values), *rest),
                chunks=chunk,
                shards=shard,
                dtype="str" if values.dtype == object else values.dtype,
                compressors=ZstdCodec(level=ZSTD_LEVEL),
            )

    def check_keys(self, keys: list[str], start: int) -> None:
        """Refuse ``keys`` that are not those of the store's rows from ``start``, which the other part wrote."""
        known = [str(key) for key in self.group["key"][start : start + len(keys)]]
        if known != keys:
            row = next((i for i, (a, b) in enumerate(zip(known, keys, strict=False)) if a != b), len(known))
            there = repr(known[row]) if row < len(known) else "no more rows"
            raise UserError(
                f"{self.path}: row {start + row} is {there} in the store and {keys[row]!r} in the source; "
                "both commands must read the same source"
            )

    def _cut_report(self) -> None:
        """Drop from the report of skips what a killed run wrote beyond the committed rows."""
        if self._report.is_file():
            with self._report.open("r+b") as report:
                for _ in range(sum(self.state["skipped"].values())):
                    report.readline()
                report.truncate()


class TokenReader:
    """Random reads of a store's committed rows, for training above all; may be used by several threads.

    The shards last read are kept decoded, up to what ``cached_rows`` rows of all arrays take: 2.6 KB a row of the
    paper's 1024 image and 256 text tokens, and 0.5 KB for each version of the text. Within so many rows any order is
    fast; beyond, most reads of rows that lie apart decode a whole shard.
    """

    def __init__(self, path: Path, cached_rows: int = CACHED_ROWS) -> None:
        """Raises UserError when ``path`` is no token store or a part that training needs is missing."""
        self.path = path
        self._group = _group(path, "r")
        self.attributes: dict[str, Any] = dict(self._group.attrs)
        if self.attributes.get("format") != "dalle-tokens":
            raise UserError(f"{path}: is no token store; make one with tokenize-text and encode-images")
        _check_version(path, self.attributes)
        names = sorted(metadata.parent.name for metadata in path.glob("*/zarr.json"))
        self._arrays: dict[str, Any] = {name: self._group[name] for name in names}
        sizes = [math.prod(array.shape[1:]) * array.dtype.itemsize for array in self._arrays.values()]
        self.cache_limit = sum(sizes) * max(cached_rows, ROWS_PER_SHARD)
        """The most that decoded shards take."""
        self._cache: dict[tuple[str, int, int | None], np.ndarray] = {}
        self.cached_bytes = 0
        self._lock = threading.Lock()

    def part(self, part: Part) -> dict[str, Any]:
        """State of a part: ``rows``, ``complete``, ``identity``, ``skipped``.

        Raises:
            UserError: the store has no such part yet.
        """
        if part not in self.attributes:
            raise UserError(f"{self.path}: has no {part} part yet; run dalle {COMMANDS[part]} on it first")
        state: dict[str, Any] = self.attributes[part]
        return state

    def __len__(self) -> int:
        """Rows that every part present has committed."""
        return min(int(self.attributes[p]["rows"]) for p in ("text", "image") if p in self.attributes)

    def require_complete(self) -> None:
        """Refuse a store that a command is still writing or left unfinished."""
        for part, command in COMMANDS.items():
            if not self.part(part)["complete"]:
                raise UserError(
                    f"{self.path}: its {part} part stops at row {self.part(part)['rows']}; "
                    f"run dalle {command} again to finish it"
                )

    def usable(self) -> np.ndarray:
        """Rows that hold both a caption and a picture, ascending, int64."""
        n = len(self)
        ok = (self._arrays["text_length"][:n] > 0) & (self._arrays["image_ok"][:n] > 0)
        return np.flatnonzero(ok)

    def epoch_text(self, rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What training sees of the captions at ``rows`` (n,) in ``epochs`` (n,): tokens (n, T), lengths (n,)."""
        if "text_versions" not in self._arrays:
            return self.read("text", rows), self.read("text_length", rows)
        versions = self.read("text_versions", rows).astype(np.int64)
        version = np.where(versions > 0, epochs % np.maximum(versions, 1), -1)
        text = np.empty((len(rows), self._arrays["text"].shape[1]), np.uint16)
        length = np.empty(len(rows), np.uint16)
        for one in np.unique(version):
            at = np.flatnonzero(version == one)
            if one < 0:
                text[at], length[at] = self.read("text", rows[at]), self.read("text_length", rows[at])
            else:
                text[at] = self.read("text_epochs", rows[at], int(one))
                length[at] = self.read("text_epochs_length", rows[at], int(one))
        return text, length

    def read(self, name: str, rows: np.ndarray, version: int | None = None) -> np.ndarray:
        """Values of the array ``name`` at ``rows`` (any order), shape (len(rows), ...); of an array by version, of
        one of them.
        """
        array = self._arrays[name]
        out = np.empty((len(rows), *array.shape[1 if version is None else 2 :]), array.dtype)
        shards, places = np.divmod(rows, ROWS_PER_SHARD)
        order = np.argsort(shards, kind="stable")
        borders = np.flatnonzero(np.diff(shards[order])) + 1
        groups = [order[i:j] for i, j in pairwise([0, *borders.tolist(), len(order)]) if i < j]
        # Those at hand first, before a new one takes their place.
        for at in sorted(groups, key=lambda at: (name, int(shards[at[0]]), version) not in self._cache):
            out[at] = self._shard(name, int(shards[at[0]]), version)[places[at]]
        return out

    def strings(self, name: Literal["key", "caption"], rows: Iterable[int]) -> list[str]:
        """Strings at ``rows``."""
        return [str(value) for value in self.read(name, np.asarray(list(rows), dtype=np.int64))]

    def _shard(self, name: str, shard: int, version: int | None) -> np.ndarray:
        key = (name, shard, version)
        with self._lock:
            found = self._cache.pop(key, None)
            if found is None:
                start = shard * ROWS_PER_SHARD
                at = (slice(start, start + ROWS_PER_SHARD), *(() if version is None else (version,)))
                found = np.asarray(self._arrays[name][at])
                self.cached_bytes += found.nbytes
            self._cache[key] = found  # at its end: the first is the one unused for longest
            while self.cached_bytes > self.cache_limit and len(self._cache) > 1:
                self.cached_bytes -= self._cache.pop(next(iter(self._cache))).nbytes
        return found
