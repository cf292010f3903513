"""The interface of a source of captioned pictures, and functions that several sources share."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeVar

from dalle_cli.errors import UserError

T = TypeVar("T")
IMAGE_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
}
"""Formats that are decoded, by Pillow's names, and the extensions by which sources find pictures.

Some of Pillow's other formats start programs (EPS), others are barely maintained.
"""
IMAGE_EXTENSIONS = frozenset(chain.from_iterable(IMAGE_FORMATS.values()))
UNREAD_EXTENSIONS = frozenset({"heic", "heif", "jxl", "jp2", "svg", "psd", "ico", "eps", "tga", "ppm"})
"""Extensions of pictures that are not decoded, so that they are named instead of passed over in silence."""
CAPTION_EXTENSIONS = ("txt", "caption", "json")
"""Extensions of a picture's captions, in the order in which they are tried."""
CAPTION_FIELDS = ("captions", "caption", "text", "prompt", "title", "name")
"""Fields of a picture's .json that may hold captions; the first that holds text is used."""
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 512 << 20
PAUSES = (0.1, 0.4, 1.5, 6.0)
"""Seconds before each further try of a read that failed."""
_LASTING = frozenset(
    {None, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
)
"""Errors that lie in the file and not in its file system; libraries that find damage give no number."""
MOST_WORD_LETTERS = 5000
"""Length above which a word is taken for data, such as base64; BPE needs time quadratic in it."""


class BadSample(ValueError):
    """A sample that cannot be used; the message is a short reason for lists of skipped samples."""


class Source(Protocol):
    """An indexed and picklable collection of captioned pictures, in the order of a manifest's rows or of the keys.

    Opening a source reads only its index; a defect of a sample's content raises BadSample when the sample is read.
    """

    name: str
    """Name that the user gave the source."""
    format: str
    skipped: list[tuple[str, str]]
    """Key (or member, or row) and reason of each sample that the index left out."""
    identity: str
    """Hash of keys and sizes of the samples' files, the same wherever the source lies and however its path is written.

    What was made from a source is resumed only with the same identity.
    """

    def describe(self) -> str:
        """Return a line for the log: format, name, number of samples, number left out."""
        ...

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Return the sample's name, which is unique in the source and independent of the source's location."""
        ...

    def captions(self, i: int) -> list[str]:
        """Return the usable captions of the picture in order, at least one, each stripped and never empty.

        Raises:
            BadSample: no caption can be used; the reason is that of the first.
        """
        ...

    def image_bytes(self, i: int) -> bytes:
        """Return the image file as stored, for ``images.decode_image``.

        Raises:
            BadSample: the file cannot be read.
        """
        ...


def describe(source: Source) -> str:
    """Return the line that ``Source.describe`` begins with."""
    left_out = f", {len(source.skipped)} left out" if source.skipped else ""
    return f"{source.format} {source.name}: {len(source)} samples{left_out}"


def text_captions(data: bytes) -> list[str]:
    """Return the captions in a .txt file's bytes (UTF-8, one a line), as ``clean_captions`` does."""
    lines = re.split(rb"\r\n|\r|\n", data.removeprefix(codecs.BOM_UTF8))
    return clean_captions([line for line in lines if line.strip()] or [b""])


def json_captions(data: bytes) -> list[str]:
    """Return the captions in the first of CAPTION_FIELDS, in any case, that holds a string or a list of strings.

    Raises:
        BadSample: the bytes are no JSON, or no field holds text.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("the .json is not valid JSON in UTF-8") from error
    by_name = {name.lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}
    for name in CAPTION_FIELDS:
        value = by_name.get(name)
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if texts:
            return clean_captions(texts)
    raise BadSample(f"the .json has no text in any of the fields {', '.join(CAPTION_FIELDS)}")


def first_captions_of(places: Iterable[Callable[[], list[str]]]) -> list[str]:
    """Return the captions of the first place that has any; raise the BadSample of the first place if none has."""
    first: BadSample | None = None
    for read in places:
        try:
            return read()
        except BadSample as error:
            first = first or error
    raise first or BadSample("no caption")


def clean_captions(captions: Sequence[str | bytes]) -> list[str]:
    """Return the captions that can be used, stripped.

    Raises:
        BadSample: none can be used; the reason is that of the first.
    """
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
    """Return the caption stripped.

    Raises:
        BadSample: it is empty, or holds a NUL, a lone surrogate (from JSON) or a word too long to be one.
    """
    text = text.strip()
    if not text:
        raise BadSample("the caption is empty")
    if len(text) > MOST_WORD_LETTERS and (longest := max(map(len, text.split()))) > MOST_WORD_LETTERS:
        raise BadSample(f"the caption holds a word of more than {MOST_WORD_LETTERS} letters ({longest})")
    if "\0" in text:  # UTF-16 that is read as UTF-8 looks like this
        raise BadSample("the caption is not text in UTF-8 (it holds a NUL)")
    if not is_unicode(text):
        raise BadSample("the caption is not valid Unicode (a lone surrogate)")
    return text


def read_again(what: str, read: Callable[[], T], may_return: Callable[[], bool] = lambda: True) -> T:
    """Return what ``read`` returns of a file of an opened source; if it fails, try again after each of PAUSES.

    So a file system that is away for a moment does not make its samples look bad. A file that is not found is waited
    for if it ``may_return``. ``what`` names the file in messages.

    Raises:
        BadSample: the file cannot be read for a reason of its own, or was never there.
        UserError: the file system fails, or the file is gone.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            reason = error.strerror or str(error).partition("\n")[0]
            if error.errno in _LASTING or (error.errno == errno.ENOENT and not may_return()):
                raise BadSample(f"{what} cannot be read: {reason}") from error
            if pause is None:
                raise UserError(
                    f"{error.filename or what}: cannot be read any more ({reason}); see to its disk or network, then "
                    "run the same command again"
                ) from None
            time.sleep(pause)
    raise AssertionError


def size_of(path: Path) -> int:
    """Return the size of a file that is part of a source's identity; see ``read_again`` for what is raised."""
    return read_again(str(path), lambda: os.stat(path).st_size, lambda: False)


def read_caption_file(path: Path, may_return: Callable[[], bool] = lambda: False) -> list[str]:
    """Return the captions of a .txt, .caption or .json; see ``read_again`` for what is raised."""
    captions_of = json_captions if path.suffix.lower() == ".json" else text_captions
    return captions_of(read_again("the caption", lambda: _read(path, "caption", MAX_CAPTION_BYTES), may_return))


def read_image_file(path: Path, may_return: Callable[[], bool] = lambda: False) -> bytes:
    """Return the bytes of an image file; see ``read_again`` for what is raised."""
    return read_again("the image", lambda: _read(path, "image", MAX_IMAGE_BYTES), may_return)


def _read(path: Path, what: str, limit: int) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would block forever, a device might never end
        raise BadSample(f"the {what} is not an ordinary file")
    if found.st_size > limit:
        raise BadSample(f"the {what} is larger than {limit >> 20} MiB")
    return path.read_bytes()


def unread_format(extension: str) -> str:
    """Return the reason for leaving out a picture with one of UNREAD_EXTENSIONS."""
    return f"a .{extension} is not read; convert it to JPEG or PNG"


def is_unicode(text: str) -> bool:
    """Return whether the text can be encoded as UTF-8, that is, has no lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def split_extension(path: str) -> tuple[str, str]:
    """Split "a/b.c.JPG" into "a/b.c" and "jpg"; the extension is "" where the file's name has none."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem:
        return path, ""
    return folder + slash + stem, extension.lower()
