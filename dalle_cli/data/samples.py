"""What every source of captioned images offers, and what the sources share."""

from __future__ import annotations

from typing import Protocol

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
MAX_CAPTION_BYTES = 1 << 20


class BadSample(ValueError):
    """One sample cannot be used; the message is a short reason for lists of skipped samples."""


class Source(Protocol):
    """An indexable, picklable set of samples, sorted by key; the same spec gives the same order everywhere.

    `skipped` lists (key or member name, reason) for what the index itself left out. Whatever is wrong with a
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

    def caption(self, i: int) -> str:
        """The caption, stripped and never empty. BadSample if there is none or it cannot be decoded."""
        ...

    def image_bytes(self, i: int) -> bytes:
        """The image file as stored, for `images.decode_image`. Raises BadSample if it cannot be read."""
        ...


def describe(source: Source) -> str:
    left_out = f", {len(source.skipped)} left out" if source.skipped else ""
    return f"{source.format} {source.name}: {len(source)} samples{left_out}"


def text_caption(data: bytes) -> str:
    """The caption a .txt file holds: UTF-8, with or without a byte order mark."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(f"the caption is not UTF-8 (byte {error.start})") from error
    return clean_caption(text)


def clean_caption(text: str) -> str:
    """Stripped; BadSample if nothing is left, or if it has no UTF-8 form (a lone surrogate, from JSON)."""
    text = text.strip()
    if not text:
        raise BadSample("the caption is empty")
    if not is_unicode(text):
        raise BadSample("the caption is not valid Unicode (a lone surrogate)")
    return text


def is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def split_extension(path: str) -> tuple[str, str]:
    """("a/b.c", "jpg") for "a/b.c.JPG"; the extension is lower-case and "" where the file's name has none."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem:
        return path, ""
    return folder + slash + stem, extension.lower()
