"""Parse a page that a command wrote."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser

from PIL import Image


class Page(HTMLParser):
    """Text, headings, links, tags and pictures of a page; fails if a tag does not close."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, Image.Image] = {}
        self.links: list[str] = []
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if tag == "img":
            kind, _, data = str(values["src"]).partition(",")
            assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
            self.images[str(values["alt"])] = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        self.links += [
            str(value) for name, value in attrs if name in ("href", "src") and not str(value).startswith("data:")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data
