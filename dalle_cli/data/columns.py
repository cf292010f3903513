"""Which columns of a manifest hold the pictures' paths, their captions and their keys, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

IMAGE_COLUMNS = (
    *("path", "image_path", "img_path", "filepath", "file_path", "file", "file_name", "filename"),
    *("image_file", "image_name", "image", "img", "url", "image_url", "img_url"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "title", "comment")
KEY_COLUMNS = ("key", "id")

_NUMBERED = re.compile(r"caption_?[0-9]+")


@dataclass(frozen=True)
class Columns:
    """Names as the manifest spells them."""

    image: str
    captions: tuple[str, ...]
    key: str | None


def find_columns(names: Iterable[str]) -> Columns | None:
    """The first known name of each kind, in any case; all of caption_0, caption_1, ... count. None without a picture
    or without a caption."""
    spelled = {name.strip().lower(): name for name in reversed(list(names))}
    image = next((spelled[name] for name in IMAGE_COLUMNS if name in spelled), None)
    caption = next(((spelled[name],) for name in CAPTION_COLUMNS if name in spelled), None)
    numbered = tuple(spelled[name] for name in sorted(spelled, key=_number) if _NUMBERED.fullmatch(name))
    captions = caption or numbered
    if image is None or not captions:
        return None
    return Columns(image, captions, next((spelled[name] for name in KEY_COLUMNS if name in spelled), None))


def looked_for(found: Iterable[str]) -> str:
    """What an error says when `find_columns` finds none."""
    there = ", ".join(name.strip()[:40] for name in list(found)[:12]) or "none"
    return (
        f"no columns of pictures and captions (its columns: {there}; "
        f"looked for {', '.join(IMAGE_COLUMNS)} and for {', '.join(CAPTION_COLUMNS)}, caption_0 ...)"
    )


def _number(name: str) -> tuple[int, str]:
    digits = re.sub("[^0-9]", "", name)
    return int(digits) if digits else 0, name
