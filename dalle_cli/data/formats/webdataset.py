"""WebDataset tar shards: a sample consists of members of the same name, an image and a .txt or .json.

The index is made from the members' headers alone, or read from its file. A sample's bytes are read from their offset in
the shard; nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, pairwise
from typing import Literal

import numpy as np

from dalle_cli.data.formats.shard_index import (
    IMAGE,
    JSON,
    NONE,
    TEXT,
    ShardIndex,
    find_index,
    index_folder,
    index_places,
    index_shard,
    keys_and_sizes,
    save_index,
)
from dalle_cli.data.formats.tar_members import LocalFile, TarFile
from dalle_cli.data.index import argsort_strings, hash_members
from dalle_cli.data.remote import RemoteFile
from dalle_cli.data.source import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    BadSample,
    describe,
    first_captions_of,
    json_captions,
    text_captions,
)
from dalle_cli.data.workers import available_cores, map_blocks, split_blocks
from dalle_cli.errors import UserError
from dalle_cli.progress import log, progress
from dalle_cli.stores.files import write_atomically

Where = Literal["memory", "cache", "folder", "beside"]
"""Place to keep indexes in. ``cache`` is the folder of indexes if it can be written, and memory otherwise; ``folder``
is that folder or an error; ``beside`` is the folder of each shard."""
_IDENTITY = re.compile(rb"[0-9a-f]{64}")
KEPT_FROM = 256 << 20
"""Number of bytes of shards from which their indexes are kept, in the folder of indexes."""
_ASKED_AT_ONCE = 32
"""Number of shards on servers whose versions are asked for at once."""
_MANY_SHARDS = 32
"""Number of shards without an index from which progress of indexing is shown."""


class WebDatasetSource:
    """The samples of one or several shards, sorted by key.

    A key is the member's path without the last extension, after the shard's name if there are several shards, as in
    "shapes-00001/00001234". Members of a key may lie apart in a shard; if a key has a second image, .txt or .json, its
    first sample is used and the rest is left out. The captions are the lines of the .txt, or else the text (a string or
    a list) in the first of CAPTION_FIELDS of the .json.

    Raises:
        UserError: there is no sample.
    """

    format = "webdataset"

    def __init__(self, name: str, shards: Sequence[TarFile]) -> None:
        self.name = name
        labels = _labels(shards)
        # Keys begin with these, so that whole shards follow each other in the order of keys.
        order = sorted(range(len(shards)), key=lambda i: f"{labels[i]}/")
        self._shards = [shards[i] for i in order]
        self._prefixes = [f"{labels[i]}/" if len(shards) > 1 else "" for i in order]
        self._indexes = open_indexes(self._shards)
        self.skipped = [
            (prefix + member if member else labels[i], reason)
            for i, prefix, index in zip(order, self._prefixes, self._indexes, strict=True)
            for member, reason in index.left_out
        ]
        self._ends = np.cumsum([len(index) for index in self._indexes])
        if not self._ends[-1]:
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise UserError(f"{name}: no samples found (looked for members ending in {kinds} in .tar shards){why}")
        nested = any(b.startswith(a) for a, b in pairwise(self._prefixes))
        self._order = self._order_of_all() if nested else None
        self.identity = self._identity()

    def describe(self) -> str:
        shards = f" ({len(self._shards)} shards)" if len(self._shards) > 1 else ""
        return describe(self) + shards

    def __len__(self) -> int:
        return int(self._ends[-1] if self._order is None else len(self._order))

    def key(self, i: int) -> str:
        shard, place = self._place(i)
        return self._prefixes[shard] + self._indexes[shard].samples().keys[place]

    def captions(self, i: int) -> list[str]:
        shard, place = self._place(i)
        sizes = self._indexes[shard].samples().members[place, :, 1]
        roles = [role for role in (TEXT, JSON) if sizes[role] != NONE]
        if not roles:
            raise BadSample("no caption (no .txt or .json member beside the image)")
        return first_captions_of(partial(self._captions_of, i, role) for role in roles)

    def image_bytes(self, i: int) -> bytes:
        return self._read(i, IMAGE, "image", MAX_IMAGE_BYTES)

    @property
    def on_server(self) -> bool:
        """Samples may be read from a server: shards are there, or are copies that may be deleted."""
        return any(not isinstance(shard, LocalFile) or shard.origin is not None for shard in self._shards)

    def ranges(self, i: int, roles: Sequence[int]) -> list[tuple[RemoteFile, int, int]]:
        """Return the file, the offset and the size of those members of a sample that are read from a server."""
        shard, place = self._place(i)
        file = self._shards[shard]
        if not isinstance(file, RemoteFile):
            return []
        members = self._indexes[shard].samples().members[place].tolist()
        sizes = {IMAGE: MAX_IMAGE_BYTES, TEXT: MAX_CAPTION_BYTES, JSON: MAX_CAPTION_BYTES}
        return [(file, *members[role]) for role in roles if 0 < members[role][1] <= sizes[role]]

    def _captions_of(self, i: int, role: int) -> list[str]:
        data = self._read(i, role, "caption", MAX_CAPTION_BYTES)
        return json_captions(data) if role == JSON else text_captions(data)

    def _read(self, i: int, role: int, what: str, limit: int) -> bytes:
        shard, place = self._place(i)
        offset, size = self._indexes[shard].samples().members[place, role].tolist()
        if size > limit:
            raise BadSample(f"the {what} is larger than {limit >> 20} MiB")
        data: bytes = self._shards[shard].read(offset, size)
        return data

    def _place(self, i: int) -> tuple[int, int]:
        """Return the number of a sample's shard, and its place there."""
        i = range(len(self))[i]
        at = i if self._order is None else int(self._order[i])
        shard = int(np.searchsorted(self._ends, at, side="right"))
        return shard, at - int(self._ends[shard]) + len(self._indexes[shard])

    def _order_of_all(self) -> np.ndarray:
        """Return the places of all samples in the order of their keys, where shards' keys are mixed."""
        keys = [key for key, _ in self._members()]
        order = argsort_strings(keys)
        repeated = {second for first, second in pairwise(order) if keys[first] == keys[second]}
        for i in sorted(repeated):
            shard = self._shards[int(np.searchsorted(self._ends, i, side="right"))]
            self.skipped.append((keys[i], f"duplicate key, also in {shard}"))
        return np.array([i for i in order if i not in repeated], np.int64)

    def _members(self) -> Iterator[tuple[str, list[int]]]:
        """Yield the key of each sample and the sizes of its members, shard after shard."""
        for prefix, index in zip(self._prefixes, self._indexes, strict=True):
            yield from ((prefix + key, sizes) for key, sizes in keys_and_sizes(index.samples_once()))

    def _identity(self) -> str:
        """Return the hash of all keys and sizes; that of indexes in files is kept in a file too."""
        if self._order is not None:
            found = list(self._members())
            return hash_members((found[i][0], *found[i][1]) for i in self._order.tolist())
        file = None
        if all(index.held is None for index in self._indexes):
            parts = chain.from_iterable(zip(self._prefixes, (index.digest for index in self._indexes), strict=True))
            name, folder = f"identity-{hashlib.sha256(repr(list(parts)).encode()).hexdigest()}", index_folder()
            file = None if folder is None else folder / name
            with suppress(OSError):
                if file is not None and _IDENTITY.fullmatch(known := file.read_bytes()):
                    return known.decode()
        identity = hash_members((key, *sizes) for key, sizes in self._members())
        if file is not None:
            with _optional():
                write_atomically(file, identity)
        return identity


def open_indexes(shards: Sequence[TarFile], where: Where | None = None) -> list[ShardIndex]:
    """Open the index of each shard; make those that are missing, on all cores, and keep them ``where``.

    None keeps them in the cache if the shards are large in all or remote, and in memory otherwise.

    Raises:
        OSError: a shard is missing or cannot be read.
        UserError: a shard at an address cannot be reached, or an index cannot be written.
    """
    found = _find_indexes(shards)
    if where is not None:
        found = [None if index is None else _saved(index, where) for index in found]
    missing = [shard for shard, index in zip(shards, found, strict=True) if index is None]
    remote = any(isinstance(shard, RemoteFile) for shard in missing)
    many = len(missing) >= _MANY_SHARDS or remote
    if where is None:
        sizes = (
            shard.state()[0] if index is None else index.header.size for shard, index in zip(shards, found, strict=True)
        )
        where = "cache" if remote or (missing and sum(sizes) >= KEPT_FROM) else "memory"
        if where == "cache" and many:
            log(f"index: {len(missing)} shards have no index yet; dalle index makes it beforehand, beside the shards")
    made: list[ShardIndex] = []
    with progress("index", len(missing), "shards") if many else nullcontext() as bar:
        blocks = split_blocks(range(len(missing)), 4)
        workers = available_cores() if many else 1
        make = partial(_make, missing, where)
        for each in map_blocks(make, blocks, workers, "start it again", afresh=remote):
            made += each
            if bar is not None:
                bar.advance(len(each))
    new = iter(made)
    return [next(new) if index is None else index for index in found]


def _find_indexes(shards: Sequence[TarFile]) -> list[ShardIndex | None]:
    """Open the index files that are there; servers are asked for the versions of many shards at once."""
    if not any(isinstance(shard, RemoteFile) for shard in shards):
        return [find_index(shard) for shard in shards]
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(pool.map(find_index, shards))


def _make(shards: Sequence[TarFile], where: Where, block: range) -> list[ShardIndex]:
    # Another rank may have made an index meanwhile.
    return [find_index(shards[i]) or _saved(index_shard(shards[i]), where) for i in block]


def _saved(index: ShardIndex, where: Where) -> ShardIndex:
    """Save an index ``where``, unless it is there, and return the index to use."""
    places = [] if where == "memory" else index_places(index.shard)
    place = next(iter(places if where == "beside" else reversed(places)), None)
    if place is None or place == index.file:
        return index
    if where != "cache":
        return save_index(index, place)
    with _optional():
        return save_index(index, place)
    return index


@contextmanager
def _optional() -> Iterator[None]:
    """Go on, and say so once, if what would save time later cannot be written."""
    global _refused
    try:
        yield
    except (OSError, UserError) as error:
        if not _refused:
            log(f"index: not kept ({error}); set DALLE_INDEX to a folder that may be written")
        _refused = True


_refused = False


def _labels(shards: Sequence[TarFile]) -> list[str]:
    """Return each shard's prefix of keys: its path without extension below the common folder of all shards."""
    try:
        common = os.path.commonpath([shard.path.parent for shard in shards])
    except ValueError:
        raise UserError(
            f"{shards[0].path} and others: some paths begin with a / and others do not; write all alike"
        ) from None
    return [shard.path.relative_to(common).with_suffix("").as_posix() for shard in shards]
