"""What every source of captioned images offers, and what the sources share."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 512 << 20


class BadSample(ValueError):
    """One sample cannot be used; the message is a short reason for lists of skipped samples."""


class Source(Protocol):
    """An indexable, picklable set of pictures with captions, in an order that follows from the data alone.

    That is the order of the list they come from (the rows of a manifest), or of their keys where there is none.
    `skipped` lists (key, member or row, reason) for what the index itself left out. Whatever is wrong with a
    sample's content shows when it is read, as BadSample.
    """

    name: str
    format: str
    skipped: list[tuple[str, str]]

    def describe(self) -> str:
        """One line for people: format, name, how many samples, how many left out."""
        ...

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The sample's name: unique in the source, and the same wherever the source lies."""
        ...

    def captions(self, i: int) -> list[str]:
        """All captions of the picture in their order, at least one, each stripped and never empty.

        One that cannot be used (not UTF-8, empty) is left out where the picture has others; BadSample, with the
        first one's reason, if none can be used, or if there is none.
        """
        ...

    def image_bytes(self, i: int) -> bytes:
        """The image file as stored, for `images.decode_image`. Raises BadSample if it cannot be read."""
        ...


def describe(source: Source) -> str:
    left_out = f", {len(source.skipped)} left out" if source.skipped else ""
    return f"{source.format} {source.name}: {len(source)} samples{left_out}"


def text_captions(data: bytes) -> list[str]:
    """The captions a .txt file holds, one a line: UTF-8, with or without a byte order mark; empty lines are none."""
    lines = re.split(rb"\r\n|\r|\n", data.removeprefix(codecs.BOM_UTF8))
    return clean_captions([line for line in lines if line.strip()] or [b""])


def clean_captions(captions: Sequence[str | bytes]) -> list[str]:
    """Those that can be used, stripped. BadSample if none can, with the first one's reason."""
    clean: list[str] = []
    reasons: list[str] = []
    for caption in captions:
        try:
            clean.append(clean_caption(caption if isinstance(caption, str) else caption.decode()))
        except UnicodeDecodeError as error:
            reasons.append(f"the caption is not UTF-8 (byte {error.start})")
        except BadSample as error:
            reasons.append(str(error))
    if not clean:
        raise BadSample(reasons[0] if reasons else "no caption")
    return clean


def clean_caption(text: str) -> str:
    """Stripped; BadSample if nothing is left, or if it is no text (a NUL, or a lone surrogate from JSON)."""
    text = text.strip()
    if not text:
        raise BadSample("the caption is empty")
    if "\0" in text:  # what UTF-16 looks like when it is read as UTF-8
        raise BadSample("the caption is not text in UTF-8 (it holds a NUL)")
    if not is_unicode(text):
        raise BadSample("the caption is not valid Unicode (a lone surrogate)")
    return text


def read_caption_file(path: Path) -> list[str]:
    """The captions of a .txt file; BadSample if it cannot be read or holds none that can be used."""
    return text_captions(_read(path, "caption", MAX_CAPTION_BYTES))


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file; BadSample if it cannot be read."""
    return _read(path, "image", MAX_IMAGE_BYTES)


def _read(path: Path, what: str, limit: int) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would wait for ever, a device never end
            raise BadSample(f"the {what} is not an ordinary file")
        if found.st_size > limit:
            raise BadSample(f"the {what} is larger than {limit >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"the {what} cannot be read: {error.strerror}") from error


def is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A file's name for people and lists, with what is not UTF-8 spelled out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def split_extension(path: str) -> tuple[str, str]:
    """("a/b.c", "jpg") for "a/b.c.JPG"; the extension is lower-case and "" where the file's name has none."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem:
        return path, ""
    return folder + slash + stem, extension.lower()
