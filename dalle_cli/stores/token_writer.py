"""Writing a token store: one part of it, or one share of a part, beside other processes that write the rest."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.checksums import write_checksums
from dalle_cli.stores.files import delete_unfinished, explain_os_errors, locked, rename_synced, sync
from dalle_cli.stores.shards import COMMANDS, WHOLE, Part, Shard, ShareProgress, Shares, join_names
from dalle_cli.stores.tokens import (
    BY_VERSION,
    FORMAT_VERSION,
    OFTEN_EMPTY,
    OLDEST_VERSION,
    ROWS_PER_BLOCK,
    ROWS_PER_CHUNK,
    TOKENIZER,
    PartState,
    TokenReader,
    open_group,
    rows_per_shard,
    rows_per_shard_of,
    sum_counts,
    sum_known_counts,
)
from dalle_cli.stores.usable_rows import keep_usable_rows
from dalle_cli.stores.zarr_files import write_attributes

ZSTD_LEVEL = 1
"""Compression level: the default takes twice the time and makes captions 10% smaller and tokens no smaller."""
MOST_REASONS = 100
"""Number of reasons of skips that are counted by name in a store's attributes; the report lists every skip."""
TOLD = ("source_name",)
"""Facts of a part that are told but may differ, since a source may lie elsewhere or its path be written otherwise."""
OTHER_REASONS = "other reasons"
OTHER: dict[Part, Part] = {"text": "image", "image": "text"}
ARRAYS: dict[Part, tuple[str, ...]] = {
    "text": ("text", "text_length", "caption", *BY_VERSION, "text_versions", "more_captions"),
    "image": ("image", "image_ok", "image_views"),
}


def create_group(path: Path, shard_rows: int) -> None:
    """Make the Zarr group of a store whose shard files hold ``shard_rows`` rows, a multiple of ROWS_PER_BLOCK."""
    import zarr

    version: dict[str, int] = {"version": OLDEST_VERSION}
    if shard_rows != ROWS_PER_BLOCK:
        version = {"version": FORMAT_VERSION, "rows_per_shard": shard_rows}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.create_group(str(path), attributes={"format": "dalle-tokens", **version}, zarr_format=3)


class PartWriter:
    """Writes one part of a store, or one share of it, in whole shard files; resumes at the last committed row.

    The same part may be written by several processes, each with another share, and both parts at the same time::

        with PartWriter(path, "text", identity, len(source), shard) as writer:
            while rows := writer.todo[: writer.rows_per_shard]:
                writer.append([source.key(row) for row in rows], ...)
            writer.finish()

    Two writers do the same work if their ``identity`` (source, hashes, sizes) is the same. ``samples`` counts the whole
    source, not only the share.

    Raises:
        UserError: ``path`` is something else, the part or another share of it was made with another identity or in
            other shares, or another process is writing this share.
    """

    def __init__(self, path: Path, part: Part, identity: Mapping[str, Any], samples: int, shard: Shard = WHOLE) -> None:
        self.path, self.part, self.samples, self.shard = path, part, samples, shard
        self._shares, self._other_shares = Shares(path, part), Shares(path, OTHER[part])
        self._other_complete = False
        self._arrays: dict[str, Any] = {}
        self._locks = ExitStack()
        with ExitStack() as locks, explain_os_errors(path):
            self._refuse_other_folders()
            locks.callback(self._remove_empty_folder)
            share = f"{path}: share {shard} of its {part} part"
            locks.enter_context(locked(self._shares.file(shard, ".lock"), share, patience=0))
            with self._common_lock():
                if not (path / "zarr.json").is_file():
                    create_group(path, rows_per_shard(samples))
                self.group = open_group(path, "r+")
                self.rows_per_shard = rows_per_shard_of(self.group, path)
                """Number of rows of a shard file."""
                self.share = shard.rows(samples, self.rows_per_shard)
                self.state = PartState.of_attributes(self.group.attrs, part, path)
                self.progress = self._begin(json.loads(json.dumps(dict(identity))))
            self._cut_report()
            self._locks = locks.pop_all()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._locks.close()

    @property
    def rows(self) -> int:
        """Number of committed rows: of this share, or of the part if that is complete."""
        return self.progress.rows

    @property
    def complete(self) -> bool:
        """True if every share of the part is complete."""
        return self.state is not None

    @property
    def todo(self) -> range:
        """Rows of the share that are still to be appended."""
        return range(0) if self.complete else range(self.share.start + self.rows, self.share.stop)

    def append(
        self,
        keys: list[str],
        arrays: Mapping[str, np.ndarray],
        skipped: Mapping[str, str],
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Write and commit the first rows of ``todo``, which fill whole shard files or reach its end.

        Args:
            keys: keys of the rows.
            arrays: values (rows, ...) by name; strings have numpy's object dtype. An array may be new in a later block,
                or wider there; other rows are then filled with zeros.
            skipped: the reason for each key without data.
            counts: numbers that are added up in the part's state.

        Raises:
            UserError: the other part has other keys at these rows, or the disk is full.
        """
        rows = range(self.todo.start, self.todo.start + len(keys))
        if rows.stop > self.share.stop:
            raise ValueError(f"rows {rows.start} to {rows.stop} end after share {self.shard}, {self.share}")
        if rows.stop % self.rows_per_shard and rows.stop != self.share.stop:
            raise ValueError(f"rows {rows.start} to {rows.stop} end inside a shard file of {self.rows_per_shard} rows")
        with explain_os_errors(self.path):
            opened = self._open_arrays({"key": np.array(keys, dtype=object), **arrays})
            for name, values in arrays.items():
                opened[name][(slice(rows.start, rows.stop), *map(slice, values.shape[1:]))] = values
            if skipped:
                report = self._shares.report(self.shard)
                with report.open("a", encoding="utf-8") as lines:
                    lines.writelines(json.dumps({"key": key, "reason": skipped[key]}) + "\n" for key in skipped)
                sync(report, report.parent)
            with self._common_lock():
                self._write_keys(keys, rows)
                sizes = self._sync(["key", *arrays], rows)
                self._commit(len(rows), skipped.values(), counts or {}, sizes)

    def add_file(self, name: str, text: str) -> None:
        """Write a file beside the arrays, whole or not at all; every share of the part writes the same."""
        beside = self.path / f"{name}.partial"
        with explain_os_errors(self.path), self._common_lock():
            beside.write_text(text, encoding="utf-8")
            rename_synced(beside, self.path / name)

    def finish(self) -> None:
        """Complete the part, unless other shares are still to be made.

        Raises:
            UserError: a share's list of skipped samples is incomplete.
        """
        if self.complete:
            # The process that completed the part may have been killed before it did this.
            with self._common_lock():
                self._write_checksums()
            self._shares.remove(keep=self._shares.file(self.shard, ".lock"))
            self._keep_usable_rows()
            return
        if self.todo:
            raise ValueError(f"rows {self.todo.start} to {self.todo.stop} of {self.path} are still to be appended")
        with explain_os_errors(self.path), self._common_lock():
            left = self._shares.unfinished(self.shard.of, self.samples, self.rows_per_shard)
            if not left:
                self._complete()
        if not left:
            self._keep_usable_rows()
        else:
            log(f"{self.path}: share {self.shard} of its {self.part} part is complete; unfinished: {join_names(left)}")

    def _keep_usable_rows(self) -> None:
        """Have a complete store keep its usable rows, and delete what was left by a process killed while it did so."""
        with self._common_lock():  # since another writer may be replacing one of the store's files
            delete_unfinished(self.path)
        keep_usable_rows(TokenReader(self.path))

    def _refuse_other_folders(self) -> None:
        """Refuse a folder that holds anything but a store or the files of a writer that was killed at its start."""
        if self.path.exists() and not (self.path / "zarr.json").is_file():
            progress = self._shares.folder
            if any(path != progress and not path.match("zarr*.partial") for path in self.path.iterdir()):
                raise UserError(f"{self.path}: exists and is no token store; choose another --tokens")

    @contextmanager
    def _common_lock(self) -> Iterator[None]:
        """Lock keys, shapes of arrays and the state of the parts against changes by other writers."""
        with locked(self._shares.folder / "lock", f"{self.path}:"):
            yield

    def _begin(self, identity: dict[str, Any]) -> ShareProgress:
        """Return this share's progress; refuse work that does not match the store."""
        if self.state is not None:
            self._check(identity, self.state.identity, self.state.rows, complete=True)
            return ShareProgress(self.samples, identity, self.state.rows, self.state.skipped, self.state.counts)
        other = PartState.of_attributes(self.group.attrs, OTHER[self.part], self.path)
        samples = {other.rows} if other else {now.samples for now in self._other_shares.all().values()}
        if samples - {self.samples}:
            raise UserError(
                f"{self.path}: its {OTHER[self.part]} part has {samples.pop()} samples, the source now has "
                f"{self.samples}; both commands must read the same source"
            )
        begun = self._shares.all()
        for shard, now in begun.items():
            self._check(identity, now.identity, now.samples)
            if shard.of != self.shard.of:
                raise UserError(
                    f"{self.path}: its {self.part} part was begun as share {shard}, now {self.shard}; make all of its "
                    f"shares with the same N, or delete {self._shares.folder} to begin again"
                )
        if self.shard in begun:
            return replace(begun[self.shard], identity=identity)
        new = ShareProgress(self.samples, identity, bytes={})
        self._shares.write(self.shard, new)
        return new

    def _check(self, identity: dict[str, Any], known: dict[str, Any], samples: int, *, complete: bool = False) -> None:
        again = "choose another --tokens, or delete the store to begin again"
        known = dict(known)
        # Earlier versions stored so many versions of each caption with BPE dropout, 0 for none of it.
        if (versions := known.pop("dropout_epochs", None)) == 0:
            known["dropout"] = 0.0
        elif versions and not complete:
            raise UserError(f"{self.path}: was begun by an earlier version, which stored BPE dropout; {again}")
        for name in {**identity, **known}:
            value = identity.get(name)
            if name in TOLD or known.get(name) == value:
                continue
            if name == "source":
                made = (
                    f"was made from {known.get('source_name')} ({samples} samples), and {identity.get('source_name')} "
                    f"({self.samples} samples) holds other files, by their names and sizes"
                )
            else:
                made = f"was made with {name} {known.get(name)!r}, now {value!r}"
            raise UserError(f"{self.path}: its {self.part} part {made}; {again}")
        if samples != self.samples:
            raise UserError(
                f"{self.path}: its {self.part} part has {samples} samples, the source now has {self.samples}; {again}"
            )

    def _open_arrays(self, values: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the arrays by name; create or widen those that are too small for ``values``."""
        shapes = {name: (self.samples, *each.shape[1:]) for name, each in values.items()}
        missing = [
            name
            for name, shape in shapes.items()
            if name not in self._arrays or any(a < b for a, b in zip(self._arrays[name].shape, shape, strict=True))
        ]
        if missing:
            with self._common_lock():
                for name in missing:
                    self._arrays[name] = self._open_array(name, shapes[name], values[name].dtype)
                    sync(self.path / name / "zarr.json", self.path / name)
                sync(self.path / "zarr.json", self.path, self.path.parent)
        return self._arrays

    def _open_array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        import zarr
        from zarr.codecs import ZstdCodec

        # Looking for empty chunks takes as long as writing them, and only the arrays of versions have many.
        with zarr.config.set({"array.write_empty_chunks": name not in OFTEN_EMPTY}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that its string type has no frozen specification yet
            if name in self.group:
                array = self.group[name]
                wide = tuple(map(max, array.shape, shape))
                if array.shape != wide:
                    array.resize(wide)
                return array
            # As many rows as are read together, since each chunk adds a fixed cost.
            chunk, shard = (ROWS_PER_BLOCK, *shape[1:]), (self.rows_per_shard, *shape[1:])
            if name in BY_VERSION:
                chunk, shard = (ROWS_PER_CHUNK, 1, *shape[2:]), (self.rows_per_shard, 1, *shape[2:])
            return self.group.create_array(
                name,
                shape=shape,
                chunks=chunk,
                shards=shard,
                dtype="str" if dtype.kind == "O" else dtype,
                compressors=ZstdCodec(level=ZSTD_LEVEL, checksum=True),
            )

    def _write_keys(self, keys: list[str], rows: range) -> None:
        """Write the keys of ``rows``, or check them where the other part has committed the rows."""
        if not self._other_complete:
            attributes = dict(open_group(self.path, "r").attrs)
            self._other_complete = PartState.of_attributes(attributes, OTHER[self.part], self.path) is not None
        for start in rows[:: self.rows_per_shard]:
            piece = range(start, min(start + self.rows_per_shard, rows.stop))
            names = keys[start - rows.start : piece.stop - rows.start]
            if self._other_complete or self._other_shares.committed(piece, self.samples, self.rows_per_shard):
                self._check_keys(names, piece)
            else:
                self._arrays["key"][piece.start : piece.stop] = np.array(names, dtype=object)

    def _check_keys(self, keys: list[str], rows: range) -> None:
        known = [str(key) for key in self._arrays["key"][rows.start : rows.stop]]
        for row, there, here in zip(rows, known, keys, strict=True):
            if there != here:
                raise UserError(
                    f"{self.path}: row {row} is {there!r} in the store and {here!r} in the source; both commands must "
                    "read the same source"
                )

    def _sync(self, names: Iterable[str], rows: range) -> dict[str, int]:
        """Have the shard files of ``rows`` on the disk before the rows are committed, and return their size by array.

        Files that a killed writer left half written beside them in a folder of their own are deleted.
        """
        size, sizes = self.rows_per_shard, dict[str, int]()
        for name in names:
            folder, sizes[name] = self.path / name / "c", 0
            shards = (folder / str(shard) for shard in range(rows.start // size, -(-rows.stop // size)))
            for shard in filter(Path.exists, shards):
                inside = list(shard.rglob("*")) if shard.is_dir() else []
                for left in (path for path in inside if path.suffix == ".partial"):
                    left.unlink()
                written = [shard, *(path for path in inside if path.suffix != ".partial")]
                sync(folder.parent, folder, *written)
                sizes[name] += sum(path.stat().st_size for path in written if path.is_file())
        return sizes

    def _commit(self, rows: int, reasons: Iterable[str], counts: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        """Commit ``rows`` more, whose arrays and keys are written; ``sizes`` are the bytes of their files by array."""
        now = self.progress
        self.progress = replace(
            now,
            rows=now.rows + rows,
            skipped=_add_reasons(now.skipped, reasons),
            counts=sum_counts([now.counts, counts]),
            bytes=sum_known_counts([now.bytes, sizes]),
        )
        self._shares.write(self.shard, self.progress)

    def _complete(self) -> None:
        """Turn the progress of all shares into the state of the part; every share is finished."""
        shares = self._shares.all()
        skipped: dict[str, int] = {}
        for shard, now in shares.items():
            report, before = self._shares.report(shard), sum(skipped.values())
            skipped = _add_reasons(skipped, _reasons(report))
            listed, expected = sum(skipped.values()) - before, sum(now.skipped.values())
            if listed != expected:
                raise UserError(
                    f"{report}: lists {listed} of {expected} skipped samples; delete "
                    f"{self._shares.file(shard, '.json')} and run dalle {COMMANDS[self.part]} --shard {shard} again"
                )
        if skipped and self.shard != WHOLE:
            self._join_reports(shares)
        counts = sum_counts(now.counts for now in shares.values())
        sizes = sum_known_counts(now.bytes for now in shares.values())
        self.state = PartState(self.samples, True, self.progress.identity, skipped, counts, bytes=sizes)
        self._sweep()
        attributes = {**open_group(self.path, "r").attrs, self.part: self.state.attribute()}
        order = ("format", "version", "rows_per_shard", "text", "image")  # the same whichever part is completed first
        write_attributes(self.path, {name: attributes[name] for name in order if name in attributes})
        self._write_checksums()
        self._shares.remove(keep=self._shares.file(self.shard, ".lock"))

    def _write_checksums(self) -> None:
        """Write checksums of the metadata, lists of skipped samples and tokenizer of all complete parts."""
        attributes, names = open_group(self.path, "r").attrs, ["zarr.json"]
        for part in COMMANDS:
            if PartState.of_attributes(attributes, part, self.path) is not None:
                names += [f"{name}/zarr.json" for name in ("key", *ARRAYS[part])]
                names += [Shares(self.path, part).report(WHOLE).name, *([TOKENIZER] if part == "text" else [])]
        write_checksums(self.path, dict.fromkeys(name for name in names if (self.path / name).is_file()))

    def _join_reports(self, shares: Iterable[Shard]) -> None:
        """Write the whole part's list of skipped samples."""
        whole = self._shares.report(WHOLE)
        beside = whole.with_name(f"{whole.name}.partial")
        with beside.open("wb") as joined:
            for report in filter(Path.is_file, map(self._shares.report, shares)):
                with report.open("rb") as lines:
                    shutil.copyfileobj(lines, joined)
        rename_synced(beside, whole)

    def _sweep(self) -> None:
        """Delete half-written files of killed writers; no process is writing this part any more.

        Those in folders of single shards were deleted when the shard was written again, so these need not be listed.
        """
        arrays = [self.path / name for name in ("key", *ARRAYS[self.part])]
        for folder in (self.path, *arrays, *(array / "c" for array in arrays)):
            for left in folder.glob("*.partial"):
                left.unlink(missing_ok=True)

    def _cut_report(self) -> None:
        """Cut lines that a killed run wrote beyond the committed rows off the list of skipped samples."""
        report = self._shares.report(self.shard)
        if report.is_file() and not self.complete:
            with report.open("r+b") as lines:
                for _ in range(sum(self.progress.skipped.values())):
                    lines.readline()
                lines.truncate()

    def _remove_empty_folder(self) -> None:
        with suppress(OSError):
            self._shares.folder.rmdir()


def _add_reasons(counts: Mapping[str, int], reasons: Iterable[str]) -> dict[str, int]:
    """Return ``counts`` with ``reasons`` counted in, sorted by name."""
    found = dict(counts)
    for reason in reasons:
        kind = reason.partition(" (")[0]  # text in brackets is specific to one sample
        kind = kind if kind in found or len(found) < MOST_REASONS else OTHER_REASONS
        found[kind] = found.get(kind, 0) + 1
    return dict(sorted(found.items()))


def _reasons(report: Path) -> Iterator[str]:
    """Yield the reasons in a list of skipped samples; damaged lines are left out."""
    if report.is_file():
        with report.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    yield str(json.loads(line)["reason"])
