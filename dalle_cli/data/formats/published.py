"""Published data sets in the layout of their archives: COCO, CUB-200-2011, Flickr8k and Flickr30k."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from dalle_cli.data.formats.manifest import ManifestSource
from dalle_cli.data.formats.tables import BadRow, DelimitedLayout, DelimitedTable, Row, Table, open_delimited
from dalle_cli.data.index import PackedStrings
from dalle_cli.data.source import is_unicode, read_caption_file
from dalle_cli.errors import UserError
from dalle_cli.stores.files import split_lines

COCO_CAPTIONS = "captions_*.json"
CUB_CAPTIONS = ("text_c10", "text")
FLICKR_CAPTIONS = ("Flickr8k.token.txt", "results_20130124.token", "results.csv", "captions.txt")
"""Names of the captions file: the authors' two, then Kaggle's for Flickr30k and for Flickr8k."""
FLICKR_FOLDERS = ("", "Flickr8k_text", "flickr30k_images")
"""Folders of the unpacked archives that may hold the captions' file."""
FLICKR_IMAGES = (
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset"),  # the authors' misspelling
    *("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "Images", "images"),
)
"""Folders of the unpacked archives that may hold the pictures."""

_PROBED = 100
"""Number of pictures whose files are looked for to find their folder."""


# --- COCO


class CocoLists(NamedTuple):
    """The images and the annotations of a captions file, as the JSON holds them."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


class CocoCaption(NamedTuple):
    """A caption with the id of its annotation and the file name of its picture."""

    id: str
    file_name: str
    caption: str


class CocoTable:
    """A `tables.Table` of a COCO captions file, sorted by file name; captions are sorted by annotation id.

    Raises:
        UserError: the file is not COCO's captions.
    """

    key_column: str | None = None

    def __init__(self, path: Path, lists: CocoLists | None = None) -> None:
        self.path = path
        images, annotations = lists or _coco_lists(path)
        self._bad: list[BadRow] = []
        names: dict[int | str, str] = {}
        for image in images:
            number, name = image.get("id"), image.get("file_name")
            if not isinstance(number, int | str) or not isinstance(name, str) or not name.strip():
                self._bad.append(BadRow(f"image {number}", "has no id or no file_name"))
            elif not is_unicode(name):
                self._bad.append(BadRow(f"image {number}", "its file_name is not valid Unicode"))
            elif number in names:
                self._bad.append(BadRow(f"image {number}", "duplicate id; its first picture is used"))
            elif (reason := _outside_folder(name)) is not None:
                self._bad.append(BadRow(f"image {number}", reason))
            else:
                names[number] = name.strip()
        captions: dict[int | str, list[tuple[int, str]]] = {}
        for annotation in annotations:
            number, image_id, caption = annotation.get("id"), annotation.get("image_id"), annotation.get("caption")
            if not isinstance(number, int) or not isinstance(caption, str):
                self._bad.append(BadRow(f"annotation {number}", "has no id or no caption"))
            elif not is_unicode(caption):
                self._bad.append(BadRow(f"annotation {number}", "its caption is not valid Unicode"))
            elif not isinstance(image_id, int | str) or image_id not in names:
                self._bad.append(BadRow(f"annotation {number}", f"its image {image_id} is not in the list of images"))
            else:
                captions.setdefault(image_id, []).append((number, caption))
        if not captions:
            raise UserError(f"{path}: holds no captions; name the captions_*.json of COCO's annotations")
        order = sorted(names, key=names.__getitem__)
        sorted_captions = [[caption for _, caption in sorted(captions.get(number, []))] for number in order]
        self._ids = PackedStrings(str(number) for number in order)
        self._images = PackedStrings(names[number] for number in order)
        self._captions = PackedStrings(caption for several in sorted_captions for caption in several)
        self._begins = np.array([0, *accumulate(map(len, sorted_captions))])

    def rows(self) -> Iterator[Row | BadRow]:
        yield from self._bad
        for place in range(len(self._images)):
            yield Row(place, f"image {self._ids[place]}", self.image(place), "")

    def image(self, place: int) -> str:
        return self._images[place]

    def key(self, place: int) -> str:
        return ""

    def captions(self, place: int) -> list[str | bytes]:
        return [self._captions[i] for i in range(self._begins[place], self._begins[place + 1])]


def open_coco(name: str, path: Path) -> ManifestSource:
    """Open a captions file, whose pictures lie where COCO's archives unpack to: train2017/ beside annotations/.

    Raises:
        UserError: the file is not COCO's captions, or its pictures are missing.
    """
    table = CocoTable(path)
    return ManifestSource(name, "coco", table, _coco_folder(table))


def coco_captions(path: Path) -> tuple[Path, list[CocoCaption]]:
    """Return the folder of the pictures of a captions file, and the usable captions in the order of their ids.

    Raises:
        UserError: the file is not COCO's captions, or its pictures are missing.
    """
    images, annotations = lists = _coco_lists(path)
    folder = _coco_folder(CocoTable(path, lists))
    names = {image.get("id"): str(image.get("file_name", "")).strip() for image in images}
    found = [
        (int(a["id"]), names[a["image_id"]], str(a["caption"]).strip())
        for a in annotations
        if isinstance(a.get("id"), int) and isinstance(a.get("caption"), str) and a.get("image_id") in names
    ]
    usable = [
        CocoCaption(str(number), name, caption)
        for number, name, caption in sorted(found)
        if caption and is_unicode(caption) and name and not _outside_folder(name)
    ]
    return folder, usable


def _coco_folder(table: CocoTable) -> Path:
    path = table.path
    split = path.stem.removeprefix("captions_")
    folder, above = path.parent, path.parent.parent
    places = [above / split, above / "images" / split, folder / split, above / "images", folder / "images", folder]
    return _image_folder(table, places, f"{split}.zip")


def _coco_lists(path: Path) -> CocoLists:
    try:
        with path.open("rb") as file:
            whole = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    lists = [_objects(whole, name) for name in ("images", "annotations")]
    if None in lists:
        raise UserError(
            f"{path}: is not COCO's captions (an object with the lists images and annotations); "
            "a manifest of JSON lines has to end in .jsonl"
        )
    return CocoLists(lists[0] or [], lists[1] or [])


def _objects(whole: Any, name: str) -> list[dict[str, Any]] | None:
    """Return the list of JSON objects under ``name``; None if there is none."""
    found = whole.get(name) if isinstance(whole, dict) else None
    return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else None


# --- CUB-200-2011


class CubTable:
    """A `tables.Table` of CUB's images.txt; the captions are in a text file for each picture, one a line."""

    key_column: str | None = None

    def __init__(self, path: Path, captions: Path) -> None:
        self.path, self._folder = path, captions
        self._bad: list[BadRow] = []
        images: list[str] = []
        for i, line in enumerate(split_lines(path.read_text(encoding="utf-8", errors="replace"))):
            number, _, image = line.strip().partition(" ")
            reason = "is not a number and a path" if not (number.isdigit() and image) else _outside_folder(image)
            if reason is None:
                images.append(image)
            elif line.strip():
                self._bad.append(BadRow(f"line {i + 1}", reason))
        self._images = PackedStrings(sorted(images))

    def rows(self) -> Iterator[Row | BadRow]:
        yield from self._bad
        for place in range(len(self._images)):
            yield Row(place, self.image(place), self.image(place), "")

    def image(self, place: int) -> str:
        return self._images[place]

    def key(self, place: int) -> str:
        return ""

    def captions(self, place: int) -> list[str | bytes]:
        return list(read_caption_file((self._folder / self._images[place]).with_suffix(".txt")))


def open_cub(name: str, path: Path) -> ManifestSource | None:
    """Open CUB-200-2011 in a folder, or in its CUB_200_2011/; None if it is not there.

    Raises:
        UserError: the captions, which are published apart from the pictures, are missing.
    """
    root = cub_root(path)
    if root is None:
        return None
    return ManifestSource(name, "cub", CubTable(root / "images.txt", cub_captions(name, root)), root / "images")


def cub_root(path: Path) -> Path | None:
    """Return the folder with images.txt and images/: ``path`` or its CUB_200_2011/; None if there is none."""
    return next((root for root in (path, path / "CUB_200_2011") if _is_cub(root)), None)


def cub_captions(name: str, root: Path) -> Path:
    """Return the folder of the captions of the pictures in ``root``; raise UserError if it is missing."""
    places = [folder / captions for folder in (root, root.parent) for captions in CUB_CAPTIONS]
    captions = next((place for place in places if place.is_dir()), None)
    if captions is None:
        looked = ", ".join(map(str, places))
        raise UserError(
            f"{name}: holds CUB's pictures but no captions; put text_c10 beside images (looked for {looked})"
        )
    return captions


def _is_cub(root: Path) -> bool:
    index = root / "images.txt"
    return (
        index.is_file() and (root / "images").is_dir() and _begins_with(index, rb"[0-9]+ \S[^\r\n]*\.[A-Za-z]+[\r\n]")
    )


# --- Flickr8k and Flickr30k


def open_flickr(name: str, path: Path) -> ManifestSource | None:
    """Open a file of Flickr's captions, whose pictures lie where the archives unpack to; None if it is another file.

    A line of the authors' files has "picture.jpg#0", a tab and a caption; Kaggle's files have a header.

    Raises:
        UserError: the pictures are missing.
    """
    table: Table
    if path.suffix == ".token" or path.name.endswith(".token.txt"):
        if not _begins_with(path, rb"[^\t\n]+#[0-9]+\t"):
            return None
        numbered = re.compile(r"#[0-9]+$")
        layout = DelimitedLayout("\t", 2, image=0, captions=(1,), header=False, quoted=False, image_suffix=numbered)
        table = DelimitedTable(path, layout)
    elif path.name in FLICKR_CAPTIONS and _begins_with(path, rb"image(_name\| comment_number\| |,)"):
        table = open_delimited(path)
    else:
        return None
    places = [folder / images for folder in (path.parent, path.parent.parent) for images in FLICKR_IMAGES]
    root = _image_folder(table, [*places, path.parent], "the pictures' archive")
    return ManifestSource(name, "flickr", table, root)


def _image_folder(table: Table, places: Sequence[Path], archive: str) -> Path:
    """Return the first of ``places`` that has one of the first pictures."""
    images = [row.image for row in islice(table.rows(), _PROBED) if isinstance(row, Row)]
    for place in places:
        if place.is_dir() and any((place / image).is_file() for image in images):
            return place
    looked = ", ".join(map(str, places))
    first = images[0] if images else "any"
    raise UserError(f"{table.path}: its pictures are missing: unpack {archive} (looked for {first} in {looked})")


def _begins_with(path: Path, pattern: bytes) -> bool:
    with path.open("rb") as file:
        return re.match(pattern, file.read(1000).removeprefix(codecs.BOM_UTF8)) is not None


def _outside_folder(image: str) -> str | None:
    """Return why a path that leaves the data set's folder is rejected; None for any other path."""
    parts = PurePosixPath(image).parts
    return "its path leads out of the folder" if image.startswith("/") or ".." in parts else None
