"""WebDataset tar shards: samples are members of one name, an image and a .txt or .json beside it.

The index is made from the members' headers alone; a sample's bytes are read from their place in the shard.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dalle_cli.data.samples import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    BadSample,
    clean_caption,
    describe,
    is_unicode,
    split_extension,
    text_caption,
)
from dalle_cli.errors import UserError

CAPTION_FIELDS = ("caption", "text", "name")  # of a sample's .json, the first that is there

_BLOCK = 512  # a tar archive is made of these


class _Span(NamedTuple):
    """Where a member's bytes lie in its shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class _Sample:
    key: str
    shard: int
    image: _Span
    text: _Span | None
    json: _Span | None


@dataclass(frozen=True)
class _Member:
    """A usable member of a shard; `run` numbers the runs of neighbours with the same key."""

    run: int
    role: str  # image, text or json
    name: str
    span: _Span


class WebDatasetSource:
    """Samples of one or several shards; a key is the member's path without the last extension.

    With several shards it follows the shard's own name: "shapes-00001/00001234". Members of one key may lie
    apart in a shard; if a kind of member comes twice, the key's first sample counts and the rest is left out.
    """

    format = "webdataset"

    def __init__(self, name: str, shards: Sequence[Path]) -> None:
        self.name = name
        self.skipped: list[tuple[str, str]] = []
        self._shards = [str(path) for path in shards]
        samples: list[_Sample] = []
        for number, (path, label) in enumerate(zip(shards, _labels(shards), strict=True)):
            prefix = f"{label}/" if len(shards) > 1 else ""
            samples += _index(path, number, prefix, label, self.skipped)
        if not samples:
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise UserError(f"{name}: no samples found (looked for members ending in {kinds} in .tar shards){why}")
        samples.sort(key=lambda sample: sample.key)
        self._samples: list[_Sample] = []
        for sample in samples:
            if self._samples and self._samples[-1].key == sample.key:
                self.skipped.append((sample.key, f"the key comes again in {self._shards[sample.shard]}"))
            else:
                self._samples.append(sample)

    def describe(self) -> str:
        shards = f" ({len(self._shards)} shards)" if len(self._shards) > 1 else ""
        return describe(self) + shards

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        return self._samples[i].key

    def caption(self, i: int) -> str:
        sample = self._samples[i]
        span = sample.json if sample.text is None else sample.text
        if span is None:
            raise BadSample("no caption (no .txt or .json member beside the image)")
        if span.size > MAX_CAPTION_BYTES:
            raise BadSample("the caption is larger than 1 MiB")
        data = self._read(sample.shard, span)
        return _json_caption(data) if sample.text is None else text_caption(data)

    def image_bytes(self, i: int) -> bytes:
        return self._read(self._samples[i].shard, self._samples[i].image)

    def _read(self, shard: int, span: _Span) -> bytes:
        path = self._shards[shard]
        try:
            # Opened for each read: no handle to share between threads, forks and pickled copies.
            with open(path, "rb", buffering=0) as file:
                file.seek(span.offset)
                data = file.read(span.size)
        except OSError as error:
            raise BadSample(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != span.size:
            raise BadSample(f"{path} is shorter than when it was indexed")
        return data


def _labels(shards: Sequence[Path]) -> list[str]:
    """Each shard's name for keys: its stem, or its path below the folder that all shards share."""
    common = Path(os.path.commonpath([path.parent for path in shards]))
    return [path.relative_to(common).with_suffix("").as_posix() for path in shards]


def _index(path: Path, number: int, prefix: str, label: str, skipped: list[tuple[str, str]]) -> list[_Sample]:
    """The samples of one shard; what cannot be used goes to `skipped`."""
    groups: dict[str, list[_Member]] = {}
    run, last = 0, ""
    size_on_disk, headers, trouble = _headers(path)
    if trouble is not None:
        skipped.append((label, trouble))
    for member in headers:
        name = PurePosixPath(member.name).as_posix()  # without ./ and //
        if member.isdir() or PurePosixPath(name).name.startswith("."):
            continue
        key, extension = split_extension(name)
        role = "image" if extension in IMAGE_EXTENSIONS else {"txt": "text", "json": "json"}.get(extension)
        if (reason := _refusal(member, name, size_on_disk)) is not None:
            skipped.append((prefix + name.encode("utf-8", "backslashreplace").decode(), reason))
        elif role is not None:
            run += key != last
            last = key
            span = _Span(member.offset_data, member.size)
            groups.setdefault(key, []).append(_Member(run, role, name, span))

    samples = []
    for key, members in groups.items():
        kept = _without_duplicates(members)
        if len(kept) < len(members):
            names = ", ".join(sorted({member.name for member in members if member not in kept}))
            skipped.append((prefix + key, f"the key comes again: its first sample is used, not the later {names}"))
        by_role = {member.role: member.span for member in kept}
        if "image" in by_role:
            samples.append(_Sample(prefix + key, number, by_role["image"], by_role.get("text"), by_role.get("json")))
        else:
            skipped.append((prefix + key, "a caption without an image"))
    return samples


def _headers(path: Path) -> tuple[int, list[tarfile.TarInfo], str | None]:
    """(size of the shard, headers of its members, what is wrong with the archive as a whole or None)."""
    found: list[tarfile.TarInfo] = []
    end = size = 0
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                found.append(member)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(_BLOCK)
    except (tarfile.TarError, OSError, ValueError) as error:
        if found:  # the last member's data or the header behind it
            return size, found, f"the archive is cut short or damaged ({error}); what precedes is used"
        return size, [], f"not a readable tar archive ({error}); a compressed one has to be unpacked first"
    # tarfile takes a damaged header for the end; the true end is a block of zeros.
    if len(block) < _BLOCK or block.strip(b"\0"):
        return size, found, f"the archive is cut short or damaged at byte {end}; what precedes is used"
    return size, found, None


def _refusal(member: tarfile.TarInfo, name: str, size_on_disk: int) -> str | None:
    if member.issym() or member.islnk():
        return "a link"
    if not member.isreg() or member.issparse():
        return "not an ordinary file"
    if not is_unicode(name):
        return "the member's name is not UTF-8"
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name:
        return "its path leads out of the archive"
    if member.size < 0 or member.offset_data + member.size > size_on_disk:
        return "cut short: the archive ends inside it"
    return None


def _without_duplicates(members: list[_Member]) -> list[_Member]:
    """All members if each role comes once; otherwise the first of each role in the key's first run."""
    if len({member.role for member in members}) == len(members):
        return members
    first: dict[str, _Member] = {}
    for member in members:
        if member.run == members[0].run:
            first.setdefault(member.role, member)
    return list(first.values())


def _json_caption(data: bytes) -> str:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("the .json is not valid JSON in UTF-8") from error
    if isinstance(fields, dict):
        for name in CAPTION_FIELDS:
            if isinstance(text := fields.get(name), str):
                return clean_caption(text)
    raise BadSample(f"the .json has no text in any of the fields {', '.join(CAPTION_FIELDS)}")
