"""A folder of images, at any depth, each with its caption in a .txt file beside it."""

from __future__ import annotations

import os
from pathlib import Path

from dalle_cli.data.samples import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    BadSample,
    describe,
    is_unicode,
    split_extension,
    text_caption,
)
from dalle_cli.errors import UserError


class FolderSource:
    """Images under `root`; a key is the path below it without the extension: "cats/0001" for cats/0001.jpg.

    Hidden files and folders are passed over; links to files are followed, links to folders are not.
    """

    format = "folder"

    def __init__(self, root: str | Path) -> None:
        self.name = str(root)
        self.skipped: list[tuple[str, str]] = []
        self._root = Path(root)
        found: dict[str, dict[str, str]] = {"image": {}, "caption": {}}  # kind -> key -> path
        for path in _files(self._root, self.skipped):
            key, extension = split_extension(path)
            kind = "image" if extension in IMAGE_EXTENSIONS else {"txt": "caption"}.get(extension)
            if kind is None:
                continue
            if not is_unicode(path):
                self.skipped.append((_printable(path), "the file's name is not UTF-8"))
            elif not (self._root / path).is_file():
                self.skipped.append((path, "not a file, or a broken link"))
            elif (first := found[kind].setdefault(key, path)) != path:
                self.skipped.append((key, f"a second {kind} for this key: {first} is used, not {path}"))
        images, captions = found["image"], found["caption"]
        self.skipped += [(key, "a caption without an image") for key in captions if key not in images]
        self._samples = [(key, path, captions.get(key)) for key, path in sorted(images.items())]
        if not images:
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise UserError(f"{root}: no images found (looked for {kinds} in the folder and those below it)")

    def describe(self) -> str:
        return describe(self)

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, i: int) -> str:
        return self._samples[i][0]

    def caption(self, i: int) -> str:
        path = self._samples[i][2]
        if path is None:
            raise BadSample("no caption (no .txt file beside the image)")
        try:
            with (self._root / path).open("rb") as file:
                data = file.read(MAX_CAPTION_BYTES + 1)
        except OSError as error:
            raise BadSample(f"the caption cannot be read: {error.strerror}") from error
        if len(data) > MAX_CAPTION_BYTES:
            raise BadSample("the caption is larger than 1 MiB")
        return text_caption(data)

    def image_bytes(self, i: int) -> bytes:
        try:
            return (self._root / self._samples[i][1]).read_bytes()
        except OSError as error:
            raise BadSample(f"the image cannot be read: {error.strerror}") from error


def _files(root: Path, skipped: list[tuple[str, str]]) -> list[str]:
    """Every file's path below `root`, with forward slashes, sorted; unreadable folders go to `skipped`."""
    found = []

    def unreadable(error: OSError) -> None:
        skipped.append((_printable(str(error.filename)), f"the folder cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _printable(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
