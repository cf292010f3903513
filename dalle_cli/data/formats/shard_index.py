"""The samples of a tar shard, and their index in a file, so that a shard is walked once and not by every command.

An index file has a line with its format and the SHA-256 of the next line, a line of JSON (``_Header``), spaces up to a
multiple of 64 bytes, and the arrays: offsets of keys (n + 1,) int64, offset and size of each sample's members (n, 3, 2)
int64, and the keys in UTF-8. It is mapped into memory when a sample is first read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dalle_cli.data.formats.tar_members import LocalFile, Member, TarFile, members_of
from dalle_cli.data.index import PackedStrings, argsort_strings
from dalle_cli.data.source import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, is_unicode, split_extension, unread_format
from dalle_cli.errors import Damaged, UserError
from dalle_cli.progress import printable
from dalle_cli.stores.files import user_cache, write_atomically
from dalle_cli.stores.typed import Count, as_type

INDEX = "DALLE_INDEX"
"""Environment variable that names the folder of indexes of shards in folders that may not be written."""
IMAGE, TEXT, JSON = range(3)
"""Roles of a sample's members."""
NONE = -1
"""Size recorded for a member that a sample lacks."""
_FORMAT = "dalle-shard-index-1"
_ALIGNMENT = 64
_BYTES_A_SAMPLE = 8 + 3 * 2 * 8
_MAPPED = 50_000
"""Maximum number of index files that are mapped at once; systems allow a process 65,530 maps."""


class Samples(NamedTuple):
    """Arrays of a shard's n samples, sorted by key."""

    keys: PackedStrings
    members: np.ndarray
    """(n, 3, 2) int64: offset and size of each member by its role; the size is NONE for a missing one."""


@dataclass(frozen=True)
class _Header:
    """Description of a shard and its index file in the file itself."""

    size: Count
    changed: str
    """The shard's mark of its version; see ``LocalFile.state``."""
    samples: Count
    key_bytes: Count
    digest: str
    """SHA-256 of the arrays."""
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a shard: in memory, or in an index file."""

    shard: TarFile
    header: _Header
    held: Samples | None
    file: Path | None

    def __len__(self) -> int:
        return self.header.samples

    @property
    def digest(self) -> str:
        return self.header.digest

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """Member, "" for the archive as a whole, and reason of what the index left out."""
        return self.header.left_out

    def samples(self) -> Samples:
        """Return the arrays of the samples.

        Raises:
            UserError: the index file has been damaged, and the shard has changed, since it was opened.
        """
        return self.held if self.held is not None else _mapped(self)

    def samples_once(self) -> Samples:
        """Return the arrays as ``samples`` does, for a walk through all shards that leaves none of them mapped."""
        return self.held if self.held is not None else _mapped.__wrapped__(self)


def index_shard(shard: TarFile) -> ShardIndex:
    """Index a shard by its members' headers.

    Raises:
        OSError: the shard is missing or cannot be read.
        UserError: a shard at an address cannot be reached.
    """
    size, changed = shard.state()
    left_out: list[tuple[str, str]] = []
    found = _samples_of(_groups(members_of(shard), size, left_out), left_out)
    arrays = _arrays(found)
    digest = hashlib.sha256(arrays).hexdigest()
    key_bytes = len(arrays) - _BYTES_A_SAMPLE * len(found.keys) - 8
    header = _Header(size, changed, len(found.keys), key_bytes, digest, tuple(left_out))
    return ShardIndex(shard, header, found, None)


def index_places(shard: TarFile) -> list[Path]:
    """Return the places of a shard's index file: beside it if it is on this machine, and in the folder of indexes."""
    where = str(shard.path.resolve()) if isinstance(shard, LocalFile) else shard.url
    name = f"{shard.path.name}-{hashlib.sha256(where.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.index"
    beside = [shard.path.with_name(f"{shard.path.name}.index")] if isinstance(shard, LocalFile) else []
    folder = index_folder()
    return beside if folder is None else [*beside, folder / name]


def index_folder() -> Path | None:
    """Return the folder of indexes that do not lie beside their shards; None for a user without a home."""
    if named := os.environ.get(INDEX):
        return Path(named)
    try:
        return user_cache("index")
    except UserError:
        return None


def find_index(shard: TarFile) -> ShardIndex | None:
    """Open a shard's index file; None if there is none, or none of this version of the shard.

    The index of a shard whose server tells no versions apart is never kept.

    Raises:
        OSError: the shard is missing.
        UserError: a shard at an address cannot be reached.
    """
    state = None
    for file in index_places(shard):
        if (header := _read_header(file)) is not None:
            state = state or shard.state()
            if (header.size, header.changed) == state and header.changed:
                return ShardIndex(shard, header, None, file)
    return None


def save_index(index: ShardIndex, file: Path) -> ShardIndex:
    """Write an index file, and return the index that reads it; see ``find_index``."""
    if not index.header.changed:
        return index
    write_atomically(file, _head(index.header) + _arrays(index.samples()))
    return ShardIndex(index.shard, index.header, None, file)


def _head(header: _Header) -> bytes:
    line = json.dumps(asdict(header)).encode()
    head = f"{_FORMAT} {hashlib.sha256(line).hexdigest()}\n".encode() + line
    return head + b" " * (-(len(head) + 1) % _ALIGNMENT) + b"\n"


def _read_header(file: Path) -> _Header | None:
    """Return a whole index file's header; None if it is missing, cut or damaged."""
    try:
        with file.open("rb") as opened:
            first, line = opened.readline(200), opened.readline(64 << 20)
            form, _, digest = first.decode("ascii").strip().partition(" ")
            if form != _FORMAT or hashlib.sha256(line.rstrip(b" \n")).hexdigest() != digest:
                return None
            header = as_type(_Header, json.loads(line), file)
            whole = opened.tell() + 8 + _BYTES_A_SAMPLE * header.samples + header.key_bytes
            return header if os.fstat(opened.fileno()).st_size == whole else None
    except (OSError, ValueError, Damaged, RecursionError):
        return None


@lru_cache(maxsize=_MAPPED)
def _mapped(index: ShardIndex) -> Samples:
    """Map an index file's arrays, or index the shard anew if they are not what was written."""
    assert index.file is not None
    header, n = index.header, index.header.samples
    found = None
    try:
        begin = len(_head(header))
        data: np.ndarray = np.memmap(index.file, np.uint8, "r", begin)  # at least the first offset
        if hashlib.sha256(data.data).hexdigest() == header.digest:
            offsets, rest = np.split(data, [8 * (n + 1)])
            members, keys = np.split(rest, [6 * 8 * n])
            packed = PackedStrings.of(keys, offsets.view(np.int64))
            found = Samples(packed, members.view(np.int64).reshape(n, 3, 2))
    except (OSError, ValueError):
        pass
    if found is not None and _within(found, header):
        return found
    again = index_shard(index.shard)
    if again.header != header:
        raise UserError(f"{index.file}: is damaged or of another version of {index.shard}; delete it and run again")
    return again.samples()


def _within(samples: Samples, header: _Header) -> bool:
    """Return whether all members lie inside the shard, and all keys inside their buffer and their folder."""
    offsets, sizes = samples.members[..., 0], samples.members[..., 1]
    there = sizes != NONE
    inside = bool((~there | ((offsets >= 0) & (sizes >= 0) & (offsets + sizes <= header.size))).all())
    return inside and samples.keys.is_whole() and not _leads_out(samples.keys)


def _leads_out(keys: PackedStrings) -> bool:
    """Return whether a key might be a path out of its folder, which ``_rejection`` allows no member."""
    data, offsets = keys.buffers()
    text = data.tobytes()
    if b"\\" in text or (data[offsets[:-1][np.diff(offsets) > 0]] == ord("/")).any():
        return True
    return b".." in text and any(".." in PurePosixPath(keys[i]).parts for i in range(len(keys)))


def _arrays(samples: Samples) -> bytes:
    keys, offsets = samples.keys.buffers()
    return offsets.tobytes() + samples.members.tobytes() + keys.tobytes()


class _Part(NamedTuple):
    """A usable member of a sample."""

    run: int
    """Number of the run of consecutive members with the same key."""
    role: int
    extension: str
    offset: int
    size: int


def _groups(members: list[Member | str], shard_size: int, left_out: list[tuple[str, str]]) -> dict[str, list[_Part]]:
    """Return the usable members by key; append the others to ``left_out``."""
    groups: dict[str, list[_Part]] = {}
    run, last = 0, ""
    for member in members:
        if isinstance(member, str):
            left_out.append(("", member))
            continue
        name = member.name
        if "./" in name or "//" in name or name.endswith(("/", "/.")):
            name = PurePosixPath(name).as_posix()
        if member.folder or name.rpartition("/")[2].startswith("."):
            continue
        key, extension = split_extension(name)
        role = IMAGE if extension in IMAGE_EXTENSIONS else {"txt": TEXT, "json": JSON}.get(extension)
        if (reason := _rejection(member, name, shard_size)) is not None:
            left_out.append((printable(name), reason))
        elif extension in UNREAD_EXTENSIONS:
            left_out.append((name, unread_format(extension)))
        elif role is not None:
            run += key != last
            last = key
            part = _Part(run, role, name[len(key) + 1 :], member.offset, member.size)
            groups.setdefault(key, []).append(part)
    _join_names_of_two_extensions(groups, left_out)
    return groups


def _samples_of(groups: dict[str, list[_Part]], left_out: list[tuple[str, str]]) -> Samples:
    keys: list[str] = []
    members = np.full((len(groups), 3, 2), NONE, np.int64)
    for key, parts in groups.items():
        unique = _without_duplicates(parts)
        if len(unique) < len(parts):
            names = ", ".join(sorted({f"{key}.{part.extension}" for part in parts if part not in unique}))
            left_out.append((key, f"duplicate key: its first sample is used, not the later {names}"))
        if not any(part.role == IMAGE for part in unique):
            left_out.append((key, "a caption without an image"))
            continue
        for part in unique:
            members[len(keys), part.role] = part.offset, part.size
        keys.append(key)
    order = argsort_strings(keys)
    return Samples(PackedStrings(keys[i] for i in order), members[order])


def _join_names_of_two_extensions(groups: dict[str, list[_Part]], left_out: list[tuple[str, str]]) -> None:
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
        pictures = [key for key in keys if any(part.role == IMAGE for part in groups[key])]
        alone = [key for key in pictures if all(part.role == IMAGE for part in groups[key])]
        captions = [key for key in keys if key not in pictures]
        if len(pictures) == 1 and alone and captions and stem not in groups:
            groups[stem] = [part for key in (*alone, *captions) for part in groups.pop(key)]
        elif stem in pictures and stem not in alone:
            for key in alone:
                extension = groups.pop(key)[0].extension
                left_out.append((f"{key}.{extension}", f"a further picture of {stem}, without a caption"))


def _rejection(member: Member, name: str, shard_size: int) -> str | None:
    """Return why a member cannot be used; None if it can."""
    if member.fault is not None:
        return member.fault
    if not is_unicode(name):
        return "the member's name is not UTF-8"
    if name.startswith("/") or "\\" in name or (".." in name and ".." in PurePosixPath(name).parts):
        return "its path leads out of the archive"
    if member.size < 0 or member.offset + member.size > shard_size:
        return "cut short: the archive ends inside it"
    return None


def _without_duplicates(parts: list[_Part]) -> list[_Part]:
    """Return all members if each role occurs once, otherwise the first of each role in the key's first run."""
    if len({part.role for part in parts}) == len(parts):
        return parts
    first: dict[int, _Part] = {}
    for part in parts:
        if part.run == parts[0].run:
            first.setdefault(part.role, part)
    return list(first.values())


def keys_and_sizes(samples: Samples) -> Iterator[tuple[str, list[int]]]:
    """Yield the key of each sample and the sizes of its members by role."""
    for start in range(0, len(samples.keys), 4096):
        sizes = samples.members[start : start + 4096, :, 1].tolist()
        for i, each in enumerate(sizes):
            yield samples.keys[start + i], each
