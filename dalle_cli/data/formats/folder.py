"""Folders of images, each with its captions in a file beside it, or in a folder of their own."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from dalle_cli.data.index import PackedStrings, argsort_strings, hash_members
from dalle_cli.data.source import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    UNREAD_EXTENSIONS,
    BadSample,
    describe,
    first_captions_of,
    is_unicode,
    read_again,
    read_caption_file,
    read_image_file,
    size_of,
    split_extension,
    unread_format,
)
from dalle_cli.errors import UserError
from dalle_cli.progress import printable

_WANTED = IMAGE_EXTENSIONS | UNREAD_EXTENSIONS | frozenset(CAPTION_EXTENSIONS)


@dataclass
class _Image:
    """An image, its extension, and the extensions of its captions after its key, such as "txt" or "jpg.txt"."""

    extension: str
    captions: list[str] = field(default_factory=list)
    elsewhere: str = ""
    """Path of its caption if that is not the key with an extension."""


class FolderSource:
    """The images at any depth of a folder, sorted by key: the path without extension, "cats/0001" for cats/0001.jpg.

    Captions are the lines of cats/0001.txt, cats/0001.caption or cats/0001.jpg.txt, or the text in cats/0001.json; the
    first of these that holds a caption is used. Captions and images that are left over belong together if no other ones
    have the same name, as images/0001.jpg and texts/0001.txt do. Names may differ in the form of their Unicode. A
    left-over image such as cats/0001.mask.png, beside a captioned cats/0001.jpg, is no sample. Hidden files and folders
    are ignored; links to files are followed, links to folders are not.

    Raises:
        UserError: there is no image.
    """

    format = "folder"

    def __init__(self, root: str | Path) -> None:
        self.name = str(root)
        self.skipped: list[tuple[str, str]] = []
        self._root = Path(root)
        images: dict[str, _Image] = {}
        left: list[str] = []
        folders = [""]
        while folders:
            below = folders.pop()
            self._add_folder(below, self._files(below, folders), images, left)
        self._pair_left_over(images, left)
        self._drop_further_pictures(images)
        if not images:
            extensions = ", ".join(sorted(IMAGE_EXTENSIONS))
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise UserError(f"{root}: no images found (looked for {extensions} in the folder and those below it){why}")
        keys = list(images)
        order = [keys[i] for i in argsort_strings(keys)]
        kinds: dict[tuple[str, tuple[str, ...]], int] = {}
        of = [kinds.setdefault((images[key].extension, tuple(images[key].captions)), len(kinds)) for key in order]
        self.skipped.sort()
        self._keys, self._kinds, self._kind_of = PackedStrings(order), list(kinds), np.array(of, np.int32)
        elsewhere = [images[key].elsewhere for key in order]
        self.identity = hash_members((key, *self._sizes(key, images[key])) for key in order)
        self._elsewhere = PackedStrings(elsewhere) if any(elsewhere) else None
        self.captioned = sum(bool(images[key].captions or images[key].elsewhere) for key in order)
        """Number of images with a file of captions."""

    def _sizes(self, key: str, image: _Image) -> Iterator[object]:
        """Yield the names and sizes of a sample's files."""
        files = [image.extension, *image.captions]
        for file in [*(f"{key}.{extension}" for extension in files), *([image.elsewhere] if image.elsewhere else [])]:
            yield file
            with suppress(BadSample):  # told when the sample is read
                yield size_of(self._root / file)

    def describe(self) -> str:
        without = len(self) - self.captioned
        return describe(self) + (f", {without} without a caption" if without else "")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        files = [f"{self._keys[i]}.{extension}" for extension in self._kinds[self._kind_of[i]][1]]
        if self._elsewhere is not None and (path := self._elsewhere[i]):
            files.append(path)
        if not files:
            raise BadSample(f"no caption (no .{', .'.join(CAPTION_EXTENSIONS)} beside the image)")
        return first_captions_of(partial(read_caption_file, self._root / file, lambda: True) for file in files)

    def image_bytes(self, i: int) -> bytes:
        return read_image_file(self._root / f"{self._keys[i]}.{self._kinds[self._kind_of[i]][0]}", lambda: True)

    def _add_folder(self, below: str, names: list[str], images: dict[str, _Image], left: list[str]) -> None:
        """Add a folder's images, with the captions beside them, and the paths of the captions that are left."""
        stems: dict[str, str] = {}  # the key of each image in this folder, by what its captions may be named after
        captions: list[str] = []
        for name in sorted(names):
            stem, extension = split_extension(name)
            if extension in CAPTION_EXTENSIONS:
                captions.append(name)
            elif extension in UNREAD_EXTENSIONS:
                self._skip(below + name, unread_format(extension))
            elif (other := stems.get(_normal(stem))) is not None:
                used = f"{other}.{images[other].extension}"
                self._skip(below + stem, f"a second image for this key: {used} is used, not {below}{name}")
            else:
                key = below + stem
                images[key] = _Image(name[len(stem) + 1 :])
                stems[_normal(stem)] = stems[_normal(name)] = key
        by_order = sorted(captions, key=lambda name: CAPTION_EXTENSIONS.index(split_extension(name)[1]))
        for name in by_order:
            stem = split_extension(name)[0]
            found = stems.get(_normal(stem))
            if found is None:
                left.append(below + name)
            elif (below + name).startswith(f"{found}."):
                images[found].captions.append((below + name)[len(found) + 1 :])
            elif not images[found].elsewhere:
                images[found].elsewhere = below + name

    def _pair_left_over(self, images: dict[str, _Image], left: list[str]) -> None:
        """Pair images without captions with captions of the same name in another folder, where that is unambiguous."""
        named: dict[str, list[str]] = {}
        for key, image in images.items():
            if not image.captions and not image.elsewhere:
                named.setdefault(_normal(key.rpartition("/")[2]), []).append(key)
        texts: dict[str, list[str]] = {}
        for path in left:
            texts.setdefault(_normal(split_extension(path.rpartition("/")[2])[0]), []).append(path)
        for name, paths in texts.items():
            keys = named.get(name, [])
            if len(keys) == len(paths) == 1:
                images[keys[0]].elsewhere = paths[0]
                continue
            reason = "a caption without an image" if not keys else f"may belong to {len(keys)} images of this name"
            for path in paths:
                if not path.endswith(".json"):  # a .json may be anything
                    self._skip(split_extension(path)[0], reason)

    def _drop_further_pictures(self, images: dict[str, _Image]) -> None:
        """Leave out images without captions that belong to a captioned one, such as 0001.mask.png beside 0001.jpg."""
        for key, image in list(images.items()):
            below, slash, name = key.rpartition("/")
            first = images.get(below + slash + name.partition(".")[0]) if "." in name else None
            if first is not None and first.captions and not image.captions and not image.elsewhere:
                reason = f"a further picture of {name.partition('.')[0]}, without a caption"
                self._skip(f"{key}.{image.extension}", reason)
                del images[key]

    def _files(self, below: str, folders: list[str]) -> list[str]:
        """Return the images and captions directly in a folder; append its subfolders to `folders`."""
        found: list[str] = []
        try:
            entries = read_again("the folder", partial(_entries, self._root / below))
        except BadSample as error:
            self._skip(printable(below) or ".", str(error))
            return found
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{below}{entry.name}/")
            elif split_extension(entry.name)[1] in _WANTED:
                if not is_unicode(below + entry.name):
                    self._skip(printable(below + entry.name), "the file's name is not UTF-8")
                elif not entry.is_file():
                    self._skip(below + entry.name, "not a file, or a broken link")
                else:
                    found.append(entry.name)
        return found

    def _skip(self, what: str, reason: str) -> None:
        self.skipped.append((what, reason))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _normal(name: str) -> str:
    """Return a name in one form of Unicode, since macOS writes é as e and an accent where others write one letter."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
