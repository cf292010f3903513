"""Folders of images, each with its captions in a .txt file beside it, one caption a line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dalle_cli.data.index import PackedStrings, argsort_strings
from dalle_cli.data.source import (
    IMAGE_EXTENSIONS,
    BadSample,
    describe,
    is_unicode,
    printable,
    read_caption_file,
    read_image_file,
    split_extension,
)
from dalle_cli.errors import UserError

_WANTED = IMAGE_EXTENSIONS | {"txt"}


class FolderSource:
    """The images at any depth of a folder, sorted by key: the path without extension, "cats/0001" for cats/0001.jpg.

    Hidden files and folders are ignored; links to files are followed, links to folders are not.

    Raises:
        UserError: there is no image.
    """

    format = "folder"

    def __init__(self, root: str | Path) -> None:
        self.name = str(root)
        self.skipped: list[tuple[str, str]] = []
        self._root = Path(root)
        keys: list[str] = []
        kinds: dict[tuple[str, str], int] = {}  # number of each (image's extension, caption's extension or "")
        kind_of: list[int] = []
        folders = [""]
        while folders:
            below = folders.pop()
            for stem, (image, caption) in self._pairs(below, folders).items():
                if image:
                    keys.append(below + stem)
                    kind_of.append(kinds.setdefault((image, caption), len(kinds)))
                else:
                    self._skip(below + stem, "a caption without an image")
        if not keys:
            extensions = ", ".join(sorted(IMAGE_EXTENSIONS))
            why = f"; left out: {self.skipped[0][0]}: {self.skipped[0][1]}" if self.skipped else ""
            raise UserError(f"{root}: no images found (looked for {extensions} in the folder and those below it){why}")
        order = argsort_strings(keys)
        self.skipped.sort()
        self._keys = PackedStrings(keys[i] for i in order)
        self._kinds = list(kinds)
        self._kind_of = np.array(kind_of, np.int32)[order]
        self._without_caption = sum(not self._kinds[kind][1] for kind in kind_of)

    def describe(self) -> str:
        return describe(self) + (f", {self._without_caption} without a caption" if self._without_caption else "")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        extension = self._kinds[self._kind_of[i]][1]
        if not extension:
            raise BadSample("no caption (no .txt file beside the image)")
        return read_caption_file(self._root / f"{self._keys[i]}.{extension}")

    def image_bytes(self, i: int) -> bytes:
        return read_image_file(self._root / f"{self._keys[i]}.{self._kinds[self._kind_of[i]][0]}")

    def _pairs(self, below: str, folders: list[str]) -> dict[str, list[str]]:
        """Return [image's extension, caption's extension] ("" for none) by stem; append subfolders to `folders`."""
        pairs: dict[str, list[str]] = {}
        for name in sorted(self._files(below, folders)):
            stem, extension = split_extension(name)
            role = 1 if extension == "txt" else 0
            pair = pairs.setdefault(stem, ["", ""])
            if pair[role]:
                what = ("image", "caption")[role]
                used = f"{stem}.{pair[role]}"
                self._skip(below + stem, f"a second {what} for this key: {below}{used} is used, not {below}{name}")
            else:
                pair[role] = name[len(stem) + 1 :]
        return pairs

    def _files(self, below: str, folders: list[str]) -> list[str]:
        """Return the images and captions directly in a folder; append its subfolders to `folders`."""
        found: list[str] = []
        try:
            with os.scandir(self._root / below) as entries:
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
        except OSError as error:
            self._skip(printable(below) or ".", f"the folder cannot be read: {error.strerror}")
        return found

    def _skip(self, what: str, reason: str) -> None:
        self.skipped.append((what, reason))
