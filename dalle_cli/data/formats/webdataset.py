"""WebDataset tar shards: a sample consists of members of the same name, an image and a .txt or .json.

The index is made from the members' headers alone. A sample's bytes are read from their offset in the shard; nothing is
unpacked.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dalle_cli.data.index import PackedStrings, argsort_strings, hash_members
from dalle_cli.data.remote import READ_AHEAD, RemoteFile
from dalle_cli.data.source import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    UNREAD_EXTENSIONS,
    BadSample,
    describe,
    first_captions_of,
    is_unicode,
    json_captions,
    read_again,
    split_extension,
    text_captions,
    unread_format,
)
from dalle_cli.errors import UserError
from dalle_cli.progress import printable, progress

_IMAGE, _TEXT, _JSON = range(3)
"""Roles of a sample's members."""
_BLOCK = 512
"""Size of a tar archive's blocks in bytes."""
_MAX_HEADER_BYTES = 1 << 20
"""Largest accepted header, which may hold a long name or pax records."""
_NONE = -1
"""Size recorded for a member that a sample lacks."""
_MANY_SHARDS = 32
"""Number of shards from which progress of indexing is shown."""


@dataclass(frozen=True)
class LocalFile:
    """A shard on this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def size(self) -> int:
        return self.path.stat().st_size

    def open(self) -> io.RawIOBase:
        return io.FileIO(self.path)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on.

        Raises:
            BadSample, UserError: see ``read_again``; the file has become shorter.
        """

        def read() -> bytes:
            # Opened for each read, so that threads, forks and pickled copies share no handle.
            file = os.open(self.path, os.O_RDONLY)
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)

        data = read_again(str(self.path), read)
        if len(data) != size:
            raise UserError(f"{self.path}: is shorter than when it was indexed; run the command again when it is whole")
        return data


Shard = LocalFile | RemoteFile


class _Member(NamedTuple):
    """A usable member of a shard."""

    run: int
    """Number of the run of consecutive members with the same key."""
    role: int
    extension: str
    offset: int
    size: int


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

    def __init__(self, name: str, shards: Sequence[Shard]) -> None:
        self.name = name
        self.skipped: list[tuple[str, str]] = []
        self._shards = list(shards)
        keys: list[str] = []
        counts: list[int] = []  # samples of each shard
        spans: list[np.ndarray] = []  # (samples of a shard, 3, 2) int64: offset and size by role
        many = len(shards) >= _MANY_SHARDS or any(isinstance(shard, RemoteFile) for shard in shards)
        with progress("index", len(shards), "shards") if many else nullcontext() as bar:
            for shard, label in zip(shards, _labels(shards), strict=True):
                prefix = f"{label}/" if len(shards) > 1 else ""
                shard_keys, shard_spans = _index(shard, prefix, label, self.skipped)
                keys += shard_keys
                counts.append(len(shard_keys))
                spans.append(shard_spans)
                if bar is not None:
                    bar.advance()
        if not keys:
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise UserError(f"{name}: no samples found (looked for members ending in {kinds} in .tar shards){why}")
        order = argsort_strings(keys)
        shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), counts)
        repeated = {second for first, second in pairwise(order) if keys[first] == keys[second]}
        for i in sorted(repeated):
            self.skipped.append((keys[i], f"duplicate key, also in {self._shards[shard_of[i]]}"))
        order = [i for i in order if i not in repeated]
        self._keys = PackedStrings(keys[i] for i in order)
        self._shard_of = shard_of[order]
        self._spans = np.concatenate(spans)[order]
        self.identity = hash_members((keys[i], *sizes) for i, sizes in zip(order, self._spans[:, :, 1], strict=True))

    def describe(self) -> str:
        shards = f" ({len(self._shards)} shards)" if len(self._shards) > 1 else ""
        return describe(self) + shards

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        roles = [role for role in (_TEXT, _JSON) if self._spans[i, role, 1] != _NONE]
        if not roles:
            raise BadSample("no caption (no .txt or .json member beside the image)")
        return first_captions_of(partial(self._captions_of, i, role) for role in roles)

    def image_bytes(self, i: int) -> bytes:
        return self._read(i, _IMAGE, "image", MAX_IMAGE_BYTES)

    def _captions_of(self, i: int, role: int) -> list[str]:
        data = self._read(i, role, "caption", MAX_CAPTION_BYTES)
        return json_captions(data) if role == _JSON else text_captions(data)

    def _read(self, i: int, role: int, what: str, limit: int) -> bytes:
        offset, size = self._spans[i, role].tolist()
        if size > limit:
            raise BadSample(f"the {what} is larger than {limit >> 20} MiB")
        data: bytes = self._shards[self._shard_of[i]].read(offset, size)
        return data


def _labels(shards: Sequence[Shard]) -> list[str]:
    """Return each shard's prefix of keys: its path without extension below the common folder of all shards."""
    common = os.path.commonpath([shard.path.parent for shard in shards])
    return [shard.path.relative_to(common).with_suffix("").as_posix() for shard in shards]


def _index(shard: Shard, prefix: str, label: str, skipped: list[tuple[str, str]]) -> tuple[list[str], np.ndarray]:
    """Index a shard: its keys and their members' (offset, size) by role, (keys, 3, 2) int64; append to ``skipped``."""
    groups: dict[str, list[_Member]] = {}
    run, last = 0, ""
    shard_size = shard.size()
    for header in _headers(shard):
        if isinstance(header, str):
            skipped.append((label, header))
            continue
        name = PurePosixPath(header.name).as_posix()  # without ./ and //
        if header.isdir() or PurePosixPath(name).name.startswith("."):
            continue
        key, extension = split_extension(name)
        role = _IMAGE if extension in IMAGE_EXTENSIONS else {"txt": _TEXT, "json": _JSON}.get(extension)
        if (reason := _rejection(header, name, shard_size)) is not None:
            skipped.append((prefix + printable(name), reason))
        elif extension in UNREAD_EXTENSIONS:
            skipped.append((prefix + name, unread_format(extension)))
        elif role is not None:
            run += key != last
            last = key
            member = _Member(run, role, name[len(key) + 1 :], header.offset_data, header.size)
            groups.setdefault(key, []).append(member)

    _join_names_of_two_extensions(groups, prefix, skipped)
    keys: list[str] = []
    spans = np.full((len(groups), 3, 2), _NONE, np.int64)
    for key, members in groups.items():
        unique = _without_duplicates(members)
        if len(unique) < len(members):
            names = ", ".join(sorted({f"{key}.{member.extension}" for member in members if member not in unique}))
            skipped.append((prefix + key, f"duplicate key: its first sample is used, not the later {names}"))
        if not any(member.role == _IMAGE for member in unique):
            skipped.append((prefix + key, "a caption without an image"))
            continue
        for member in unique:
            spans[len(keys), member.role] = member.offset, member.size
        keys.append(prefix + key)
    return keys, spans[: len(keys)]


def _join_names_of_two_extensions(
    groups: dict[str, list[_Member]], prefix: str, skipped: list[tuple[str, str]]
) -> None:
    """Join an image and captions that are alone and share their name up to the first dot, as webdataset's keys do.

    So s0.input.jpg and s0.target.txt are one sample. An image without a caption beside a captioned one, such as
    s0.mask.png beside s0.jpg and s0.txt, is left out.
    """
    by_stem: dict[str, list[str]] = {}
    for key in groups:
        folder, slash, name = key.rpartition("/")
        by_stem.setdefault(folder + slash + name.partition(".")[0], []).append(key)
    for stem, keys in by_stem.items():
        if keys == [stem]:
            continue
        pictures = [key for key in keys if any(member.role == _IMAGE for member in groups[key])]
        alone = [key for key in pictures if all(member.role == _IMAGE for member in groups[key])]
        captions = [key for key in keys if key not in pictures]
        if len(pictures) == 1 and alone and captions and stem not in groups:
            groups[stem] = [member for key in (*alone, *captions) for member in groups.pop(key)]
        elif stem in pictures and stem not in alone:
            for key in alone:
                extension = groups.pop(key)[0].extension
                skipped.append((f"{prefix}{key}.{extension}", f"a further picture of {stem}, without a caption"))


class _HeaderFile(io.BufferedReader):
    """A file that refuses to read a header of absurd size, which tarfile would read into memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header of absurd size")
        return super().read(size)


def _headers(shard: Shard) -> Iterator[tarfile.TarInfo | str]:
    """Yield the headers of a shard's members, then, if the archive is damaged, a message."""
    found = False
    try:
        ahead = READ_AHEAD if isinstance(shard, RemoteFile) else io.DEFAULT_BUFFER_SIZE
        with _HeaderFile(shard.open(), ahead) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                found = True
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                yield member
            file.seek(tar.offset)
            block = file.read(_BLOCK)
    except (tarfile.TarError, OSError, ValueError) as error:
        if found:  # the last member's data or the header after it is damaged
            yield f"the archive is cut short or damaged ({error}); earlier samples are used"
        else:
            yield f"not a readable tar archive ({error}); a compressed one has to be unpacked first"
        return
    # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
    if len(block) < _BLOCK or block.strip(b"\0"):
        yield f"the archive is cut short or damaged at byte {tar.offset}; earlier samples are used"


def _rejection(member: tarfile.TarInfo, name: str, shard_size: int) -> str | None:
    """Return why a member cannot be used; None if it can."""
    if member.issym() or member.islnk():
        return "a link"
    if not member.isreg() or member.issparse():
        return "not an ordinary file"
    if not is_unicode(name):
        return "the member's name is not UTF-8"
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name:
        return "its path leads out of the archive"
    if member.size < 0 or member.offset_data + member.size > shard_size:
        return "cut short: the archive ends inside it"
    return None


def _without_duplicates(members: list[_Member]) -> list[_Member]:
    """Return all members if each role occurs once, otherwise the first of each role in the key's first run."""
    if len({member.role for member in members}) == len(members):
        return members
    first: dict[int, _Member] = {}
    for member in members:
        if member.run == members[0].run:
            first.setdefault(member.role, member)
    return list(first.values())
