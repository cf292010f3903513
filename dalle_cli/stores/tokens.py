"""The token store: one Zarr v3 group that ``tokenize-text`` and ``encode-images`` fill side by side.

Row i is sample i of the source, in both parts:

- part ``text``: ``text`` (N, T) uint16, ``text_length`` (N,) uint16 (0: skipped), ``caption`` (N,) string: each
  picture's first caption. With several captions a picture also ``more_captions`` (N,) string, JSON lists of the others,
  "" for none, and, without BPE dropout, ``text_epochs`` (N, E, T) uint16, ``text_epochs_length`` (N, E) uint16 and
  ``text_versions`` (N,) uint16: training sees the versions by turns (``caption_turns``), or ``text`` where that is 0.
  With BPE dropout it encodes a caption anew instead, by the file ``tokenizer.json`` (``text/training_captions.py``).
  Stores of earlier versions have versions with dropout in these arrays;
- part ``image``: ``image`` (N, grid, grid) uint16, ``image_ok`` (N,) uint8 (0: skipped). With several views a picture
  also ``image_views`` (N, V - 1, grid, grid) uint16: training at epoch e sees ``image`` where v = e mod V is 0, else
  number v - 1 of these;
- ``key`` (N,) string: written by the part that commits a row first, and checked by the other part.

Arrays have all rows from the beginning. A shard file holds ROWS_PER_BLOCK rows, or in a large store several times as
many (the group's attribute ``rows_per_shard``), in blocks of ROWS_PER_BLOCK rows that are read one by one. Each part is
written by one process, or in shares by several at a time, in whole shard files. A share's count of committed rows grows
only after its rows are written, so that a killed writer resumes at the last committed row and a reader never sees half
a row. ``stores/shards.py`` describes the files that hold the count; once the part is complete, its ``PartState`` is an
attribute of the group.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dalle_cli.errors import Damaged, UserError
from dalle_cli.randomness import SPLITMIX_STEP, splitmix64
from dalle_cli.stores.checksums import CHECKSUMS, require_undamaged
from dalle_cli.stores.places import Place, names_in
from dalle_cli.stores.shards import COMMANDS, WHOLE, Part, Shard, Shares, join_names
from dalle_cli.stores.typed import ABSENT, Count, as_type, explain_damage

FORMAT_VERSION = 4
"""Version 1 held one caption per picture, with all its BPE-dropout versions in one array that was read whole. Version 2
had no checksums, and the source's path in place of its identity. Version 3 has ROWS_PER_BLOCK rows in a shard file."""
OLDEST_VERSION = 3
"""The version that is still read, and written where it can hold the store."""
ROWS_PER_BLOCK = 4096
"""Number of rows that are decoded and cached together, and of the smallest shard files."""
MOST_SHARDS = 2**14
"""Number of shard files that an array may have; above it, files of a new store have more rows."""
ROWS_PER_CHUNK = 256
CACHED_ROWS = 2**20
USABLE = ("text_length", "image_ok")
"""Arrays that are above 0 where a row has captions, and a picture."""
OFTEN_EMPTY = ("text_epochs", "text_epochs_length")
"""Arrays of which many shards are zeros, which are not written."""
TOKENIZER = "tokenizer.json"
"""Name of the file of a store's tokenizer."""
AGAIN = "copy the store again, or delete it and make it again"
NEEDED: dict[Part, tuple[str, ...]] = {"text": ("text", "text_length", "caption"), "image": ("image", "image_ok")}
"""Arrays that each part has in every store, beside ``key``."""
BY_VERSION = (*OFTEN_EMPTY, "image_views")
"""Arrays whose second axis is chunked by one, so that each version of the text and each view is read alone."""
ARRAYS = sorted({"key", *NEEDED["text"], *NEEDED["image"], "more_captions", "text_versions", *BY_VERSION})
"""Every array that a store may have."""


@dataclass(frozen=True)
class PartState:
    """Progress of a part of a store, the facts it was made with, and the number of skipped samples by reason."""

    rows: Count
    """Number of committed rows from the first on, without a gap."""
    complete: bool
    identity: dict[str, Any]
    skipped: dict[str, Count]
    counts: dict[str, Count] = field(default_factory=dict)
    unfinished: tuple[Shard, ...] = ()
    bytes: dict[str, Count] | None = None
    """Size of the shard files of each array, with those of ``key``; None if an earlier version wrote some of them."""

    @classmethod
    def of_attributes(cls, attributes: Mapping[str, Any], part: Part, store: Place) -> PartState | None:
        """Return the state of a complete part of ``store``; None if the part is not complete."""
        found = attributes.get(part)
        state = None if found is None else as_type(cls, found, store)
        return state if state is not None and state.complete else None

    @classmethod
    def of_shares(cls, shares: Shares, rows_per_shard: int) -> PartState | None:
        """Return the state of a part that is being made; None if none of its shares has been begun."""
        found = shares.all()
        if not found:
            return None
        of, first = next((shard.of, now) for shard, now in found.items())
        rows, unfinished = 0, shares.unfinished(of, first.samples, rows_per_shard)
        for shard in (Shard(number, of) for number in range(1, of + 1)):
            rows += found[shard].rows if shard in found else 0
            if shard in unfinished:
                break
        skipped, counts = (sum_counts(getattr(now, name) for now in found.values()) for name in ("skipped", "counts"))
        sizes = sum_known_counts(now.bytes for now in found.values())
        return cls(rows, False, first.identity, skipped, counts, tuple(unfinished), sizes)

    def attribute(self) -> dict[str, Any]:
        """Return the state of a complete part as the group's attribute."""
        left_out = {"unfinished", *(["counts"] if not self.counts else []), *(["bytes"] if self.bytes is None else [])}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum for each name, sorted by name."""
    found: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            found[name] = found.get(name, 0) + count
    return dict(sorted(found.items()))


def sum_known_counts(counts: Iterable[Mapping[str, int] | None]) -> dict[str, int] | None:
    """Return the sum for each name, sorted by name; None if some of the counts are unknown."""
    every = list(counts)
    known = [each for each in every if each is not None]
    return sum_counts(known) if len(known) == len(every) else None


def rows_per_shard(samples: int) -> int:
    """Return the number of rows of a shard file in a new store: as few as possible for at most MOST_SHARDS files."""
    rows = ROWS_PER_BLOCK
    while rows * MOST_SHARDS < samples:
        rows *= 2
    return rows


def rows_per_shard_of(group: Any, path: Place) -> int:
    """Return the number of rows of a shard file in the store ``path`` with the Zarr ``group``.

    Raises:
        Damaged: the attribute that says so is not a multiple of ROWS_PER_BLOCK.
    """
    rows = as_type(Count, group.attrs.get("rows_per_shard", ROWS_PER_BLOCK), path)
    if rows < ROWS_PER_BLOCK or rows % ROWS_PER_BLOCK:
        raise Damaged(f"{path}: is damaged: its rows_per_shard is {rows}; {AGAIN}")
    return rows


def open_group(path: Place, mode: Literal["r", "r+"]) -> Any:
    """Open the Zarr group of a store.

    Raises:
        UserError: ``path`` is no token store, or one of another format; its server cannot be reached.
    """
    import zarr

    mend = "make one with tokenize-text and encode-images" if mode == "r" else "choose another --tokens"
    try:
        group: Any = zarr.open_group(str(path) if isinstance(path, Path) else path.zarr(), mode=mode, zarr_format=3)
    except UserError:  # of a server
        raise
    except PermissionError as error:
        raise UserError(f"{path}: may not be read ({error.strerror}); {mend}") from None
    except Exception as error:  # it is not there, or its metadata are not Zarr's
        if isinstance(error, OSError) and error.errno not in ABSENT:
            raise
        raise UserError(f"{path}: is no token store; {mend}") from None
    if group.attrs.get("format") != "dalle-tokens":
        raise UserError(f"{path}: is no token store; {mend}")
    version = as_type(Count, group.attrs.get("version"), path)
    if version > FORMAT_VERSION:
        raise UserError(f"{path}: its format is newer than this dalle reads; upgrade dalle")
    if version < OLDEST_VERSION:
        raise UserError(
            f"{path}: was made by an older dalle, in format {version}; delete it and make it again with tokenize-text "
            "and encode-images"
        )
    return group


def caption_turns(rows: np.ndarray, epochs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return which of its ``counts`` (n,) captions each row shows in its epoch, (n,); all of them take turns.

    Each row begins with a caption that is drawn for it. If all rows began with the same one, an epoch would show
    captions of one kind where they have kinds, such as names and descriptions, and training would forget the others.
    """
    turn, place = np.divmod(epochs, counts)
    streams = splitmix64(rows.astype(np.uint64) * SPLITMIX_STEP) + turn.astype(np.uint64) * SPLITMIX_STEP
    first = splitmix64(streams) % counts.astype(np.uint64)
    turns: np.ndarray = (place + first.astype(np.int64)) % counts
    return turns


def being_written(store: Path) -> bool:
    """Return whether a writer is at work on a store, or was killed and has not been run again."""
    return any(Shares(store, part).folder.is_dir() for part in COMMANDS)


class TokenReader:
    """Random reads of a store's committed rows, for training above all; safe to use from several threads.

    A store on a server, which is a copy of one that was made here, is read where it is.

    A cache keeps the shards read last, decoded. It holds up to ``cached_rows`` rows of all arrays: 2.6 KB a row for the
    paper's 1024 image and 256 text tokens, 0.5 KB more for each version of the text, and captions as they are read.
    Random reads in a store of at most that many rows are fast; in a larger store most of them decode a whole shard.

    Raises:
        UserError: ``path`` is no token store, or one of another format; its server cannot be reached.
    """

    def __init__(self, path: Place, cached_rows: int = CACHED_ROWS) -> None:
        self.path = path
        self.rows_per_shard = rows_per_shard_of(open_group(path, "r"), path)
        """Number of rows of a shard file."""
        # Read the progress files before the attributes: a part becomes an attribute before its files are deleted.
        unfinished: dict[Part, PartState | None] = {}
        if isinstance(path, Path):
            unfinished = {part: PartState.of_shares(Shares(path, part), self.rows_per_shard) for part in COMMANDS}
        self._group = open_group(path, "r")
        found = {
            part: PartState.of_attributes(self._group.attrs, part, path) or unfinished.get(part) for part in COMMANDS
        }
        self.parts: dict[Part, PartState] = {part: state for part, state in found.items() if state is not None}
        names = [name for name in ARRAYS if (path / name / "zarr.json").is_file()]
        with explain_damage(path):
            self.arrays: dict[str, Any] = {name: self._group[name] for name in names}
            """The store's Zarr arrays, by name."""
        for part, state in self.parts.items():
            for name in {"key", *NEEDED[part]} & self.arrays.keys():
                if state.rows and self.arrays[name].shape[:1] < (state.rows,):
                    raise Damaged(f"{path / name}: has fewer rows than the {state.rows} of the {part} part; {AGAIN}")
        sizes = [math.prod(array.shape[1:]) * array.dtype.itemsize for array in self.arrays.values()]
        self.cache_limit = sum(sizes) * max(cached_rows, ROWS_PER_BLOCK)
        """Maximum number of bytes of decoded blocks in the cache."""
        self._cache: dict[tuple[str, int, int | None], np.ndarray] = {}
        self.cached_bytes = 0
        self._lock = threading.Lock()

    def part(self, part: Part) -> PartState:
        """Return the state of a part.

        Raises:
            UserError: the store has no such part yet.
        """
        if part not in self.parts:
            raise UserError(f"{self.path}: has no {part} part yet; run dalle {COMMANDS[part]} on it first")
        return self.parts[part]

    def __len__(self) -> int:
        """Return the number of rows that every part present has committed."""
        return min(state.rows for state in self.parts.values())

    def require_complete(self) -> None:
        """Check that the store is complete.

        Raises:
            UserError: a part is still being written or was left unfinished; its unfinished shares are named.
        """
        for part, command in COMMANDS.items():
            state = self.part(part)
            if not state.complete:
                again = "again"
                if state.unfinished and state.unfinished[0] != WHOLE:
                    again = f"with --shard for its unfinished shares, {join_names(state.unfinished)},"
                raise UserError(
                    f"{self.path}: its {part} part stops at row {state.rows}; run dalle {command} {again} to finish it"
                )
        self.require_whole_metadata()
        for name in ("key", *NEEDED["text"], *NEEDED["image"]):
            if name not in self.arrays:
                raise Damaged(f"{self.path / name}: is missing; {AGAIN}")
            folder = self.path / name / "c"
            shards = -(-self.arrays[name].shape[0] // self.rows_per_shard)
            present = names_in(folder)
            if present is None:
                continue
            if missing := [str(shard) for shard in range(shards) if str(shard) not in present]:
                others = f", as are {len(missing) - 1} others" if len(missing) > 1 else ""
                raise UserError(f"{folder / missing[0]}: is missing{others}; {AGAIN}")

    def require_whole_metadata(self) -> None:
        """Raise UserError if the store's metadata are not what was written.

        They are not checked while a writer is at work, or was killed and has not been run again.
        """
        written = isinstance(self.path, Path) and being_written(self.path)
        if not written and (self.path / CHECKSUMS).is_file():
            require_undamaged(self.path)

    def shards(self) -> Iterator[tuple[Place, Callable[[], np.ndarray]]]:
        """Yield each file that committed rows are in, with a function that reads it; see ``_read_rows``."""
        for name in self.arrays:
            for rows in self._rows_of_files():
                places: list[tuple[slice | int, ...]] = [(rows,)]
                if name in OFTEN_EMPTY:
                    versions = int(np.max(self._read_rows("text_versions", (rows,)), initial=0))
                    places = [(rows, version) for version in range(versions)]
                elif name in BY_VERSION:
                    places = [(rows, version) for version in range(self.arrays[name].shape[1])]
                for at in places:
                    yield self._shard_file(name, at), partial(self._read_rows, name, at)

    def usable_bits(self) -> np.ndarray:
        """Return a bit for each row, (ceil(rows / 8),) uint8, lowest first: whether it has a caption and a picture."""
        n, files, found = len(self), self._rows_of_files(), [np.empty(0, np.uint8)]
        for some in (files[first : first + 64] for first in range(0, len(files), 64)):
            text_length, image_ok = (
                np.concatenate([self._read_rows(name, (rows,)) for rows in some]) for name in USABLE
            )
            both = (text_length > 0) & (image_ok > 0)
            found.append(np.packbits(both[: n - some[0].start], bitorder="little"))
        return np.concatenate(found)

    def captions(self, rows: np.ndarray) -> list[list[str]]:
        """Return the usable captions at each of ``rows``; none at skipped rows."""
        first, found = self.strings("caption", rows), self.read("text_length", rows) > 0
        more = self.read("more_captions", rows) if "more_captions" in self.arrays else [""] * len(rows)
        with explain_damage(self.path / "more_captions"):
            others = [list(map(str, json.loads(str(each) or "[]"))) for each in more]
        return [[a, *b] if usable else [] for a, b, usable in zip(first, others, found, strict=True)]

    def epoch_text(self, rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored tokens (n, T) and lengths (n,) of ``rows`` (n,) in ``epochs`` (n,)."""
        if "text_versions" not in self.arrays:
            return self.read("text", rows), self.read("text_length", rows)
        versions = self.read("text_versions", rows).astype(np.int64)
        version = np.where(versions > 0, caption_turns(rows, epochs, np.maximum(versions, 1)), -1)
        text = np.empty((len(rows), self.arrays["text"].shape[1]), np.uint16)
        length = np.empty(len(rows), np.uint16)
        for one in np.unique(version):
            at = np.flatnonzero(version == one)
            if one < 0:
                text[at], length[at] = self.read("text", rows[at]), self.read("text_length", rows[at])
            else:
                text[at] = self.read("text_epochs", rows[at], int(one))
                length[at] = self.read("text_epochs_length", rows[at], int(one))
        return text, length

    def epoch_image(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Return the image tokens (n, grid, grid) that training sees at ``rows`` (n,) in ``epochs`` (n,)."""
        views = self.arrays["image_views"].shape[1] + 1 if "image_views" in self.arrays else 1
        image = self.read("image", rows)
        view = epochs % views
        for one in np.unique(view[view > 0]):
            at = np.flatnonzero(view == one)
            image[at] = self.read("image_views", rows[at], int(one) - 1)
        return image

    def read(self, name: str, rows: np.ndarray, version: int | None = None) -> np.ndarray:
        """Return the values (len(rows), ...) of an array at ``rows``, in any order; ``version`` is for BY_VERSION."""
        array = self.arrays[name]
        out = np.empty((len(rows), *array.shape[1 if version is None else 2 :]), array.dtype)
        blocks, places = np.divmod(rows, ROWS_PER_BLOCK)
        order = np.argsort(blocks, kind="stable")
        borders = np.flatnonzero(np.diff(blocks[order])) + 1
        groups = [order[i:j] for i, j in pairwise([0, *borders.tolist(), len(order)]) if i < j]
        # Cached blocks come first, before a new one takes their place.
        for at in sorted(groups, key=lambda at: (name, int(blocks[at[0]]), version) not in self._cache):
            out[at] = self._block(name, int(blocks[at[0]]), version)[places[at]]
        return out

    def strings(self, name: Literal["key", "caption"], rows: Iterable[int]) -> list[str]:
        return [str(value) for value in self.read(name, np.asarray(list(rows), dtype=np.int64))]

    def _rows_of_files(self) -> list[slice]:
        """Return the rows of each shard file that holds committed rows."""
        size = self.rows_per_shard
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def _read_rows(self, name: str, at: tuple[slice | int, ...]) -> np.ndarray:
        """Read rows of one file; raise UserError if it is missing or empty, which zarr takes for zeros, or damaged."""
        array, file = self.arrays[name], self._shard_file(name, at)
        if isinstance(file, Path):
            if not file.is_file():
                raise UserError(f"{file}: is missing; {AGAIN}")
            if not file.stat().st_size:
                raise UserError(f"{file}: is empty; {AGAIN}")
        try:
            return np.asarray(array[at])
        except UserError:  # of a server
            raise
        except Exception as error:  # zarr and its codecs raise errors of many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{file}: is damaged ({reason[:100]}); {AGAIN}") from error

    def _shard_file(self, name: str, at: tuple[slice | int, ...]) -> Place:
        rows, *rest = at
        assert isinstance(rows, slice)
        place = [rows.start // self.rows_per_shard, *rest, *[0] * (self.arrays[name].ndim - len(at))]
        return self.path / name / "c" / "/".join(map(str, place))

    def _block(self, name: str, block: int, version: int | None) -> np.ndarray:
        key = (name, block, version)
        with self._lock:
            found = self._cache.pop(key, None)
            if found is None:
                rows = slice(block * ROWS_PER_BLOCK, (block + 1) * ROWS_PER_BLOCK)
                found = self._read_rows(name, (rows, *(() if version is None else (version,))))
                self.cached_bytes += found.nbytes
            self._cache[key] = found  # moved to the end, so that the first is the least recently used
            while self.cached_bytes > self.cache_limit and len(self._cache) > 1:
                self.cached_bytes -= self._cache.pop(next(iter(self._cache))).nbytes
        return found
