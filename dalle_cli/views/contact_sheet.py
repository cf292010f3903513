"""Contact sheets of samples by caption, of dVAE reconstructions, and of captioned pictures."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 30, 36)
FAINT: Colour = (118, 122, 132)
RULE: Colour = (228, 230, 235)
BEST: Colour = (14, 138, 104)
"""Colour of the frame around the best picture."""
TAG: Colour = (196, 84, 16)
"""Background colour of a row's tag, such as "held out"."""

MARGIN = 24
GAP = 8
FRAME = 4
CAPTION_WIDTH = 210
CAPTION_SIZE = 15
SMALL_SIZE = 12
TITLE_SIZE = 22
CAPTION_LINES = 4
ELLIPSIS = "…"


@dataclass(frozen=True)
class Row:
    """Pictures (H, W, 3) uint8 of a caption; ``best`` is framed, ``tag`` is a coloured label below the caption."""

    caption: str
    best: Picture
    others: Sequence[Picture] = field(default_factory=list)
    tag: str | None = None


def contact_sheet(
    rows: Sequence[Row],
    *,
    title: str | None = None,
    best_label: str = "best by CLIP",
    others_label: str = "other samples",
    cell: int = 96,
) -> Image.Image:
    """Draw a row for each caption: the caption and its tag, the best picture framed, then the other pictures.

    Pictures are ``cell`` px wide. A caption is wrapped, and ends in an ellipsis if it does not fit.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    most = max(len(row.others) for row in rows)
    best_x = MARGIN + CAPTION_WIDTH + 2 * GAP
    others_x = best_x + cell + 2 * FRAME + 2 * GAP
    width = (others_x + most * (cell + GAP) - GAP if most else best_x + cell + 2 * FRAME) + MARGIN
    width = max(width, others_x + MARGIN)
    pitch = cell + 2 * FRAME + 2 * GAP
    title_height = TITLE_SIZE + 2 * GAP if title else 0
    top = MARGIN + title_height + SMALL_SIZE + 2 * GAP
    sheet = Image.new("RGB", (width, top + len(rows) * pitch + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _line(draw, (MARGIN, MARGIN), title, _font(TITLE_SIZE), INK, width - 2 * MARGIN)
    header = (MARGIN + title_height, _font(SMALL_SIZE))
    _line(draw, (best_x, header[0]), best_label, header[1], BEST, others_x - best_x - GAP)
    if most:
        _line(draw, (others_x, header[0]), others_label, header[1], FAINT, width - MARGIN - others_x)
    for index, row in enumerate(rows):
        y = top + index * pitch
        draw.line([(MARGIN, y - GAP), (width - MARGIN - 1, y - GAP)], fill=RULE)
        _caption(draw, (MARGIN, y), row, cell + 2 * FRAME)
        draw.rectangle([best_x, y, best_x + cell + 2 * FRAME - 1, y + cell + 2 * FRAME - 1], outline=BEST, width=FRAME)
        sheet.paste(_scaled(row.best, cell), (best_x + FRAME, y + FRAME))
        for place, picture in enumerate(row.others):
            _mounted(sheet, picture, (others_x + place * (cell + GAP), y + FRAME), cell)
    return sheet


def side_by_side(
    originals: Sequence[Picture],
    reconstructions: Sequence[Picture],
    *,
    labels: tuple[str, str] = ("original", "reconstruction"),
    title: str | None = None,
    columns: int = 8,
    cell: int = 96,
) -> Image.Image:
    """Draw each picture above its reconstruction, with ``columns`` pairs on a line."""
    if len(originals) != len(reconstructions) or not originals:
        raise ValueError(f"{len(originals)} originals and {len(reconstructions)} reconstructions are no pairs")
    columns = min(columns, len(originals))
    lines = -(-len(originals) // columns)
    font = _font(SMALL_SIZE)
    gutter = max(round(font.getlength(label)) for label in labels) + 2 * GAP
    title_height = TITLE_SIZE + 2 * GAP if title else 0
    left, top, tight = MARGIN + gutter, MARGIN + title_height, 3
    pitch = 2 * cell + tight + 2 * GAP
    width = left + columns * (cell + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, top + lines * pitch - 2 * GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _line(draw, (MARGIN, MARGIN), title, _font(TITLE_SIZE), INK, width - 2 * MARGIN)
    for line in range(lines):
        for half, (label, colour) in enumerate(zip(labels, (INK, FAINT), strict=True)):
            y = top + line * pitch + half * (cell + tight)
            draw.text((left - 2 * GAP, y + cell / 2), label, fill=colour, font=font, anchor="rm")
    for index, pair in enumerate(zip(originals, reconstructions, strict=True)):
        line, column = divmod(index, columns)
        for half, picture in enumerate(pair):
            place = (left + column * (cell + GAP), top + line * pitch + half * (cell + tight))
            _mounted(sheet, picture, place, cell)
    return sheet


def captioned_grid(
    pictures: Sequence[tuple[Picture, str]], *, title: str | None = None, columns: int = 5, cell: int = 176
) -> Image.Image:
    """Draw each picture above its caption, ``columns`` on a line; a caption that does not fit ends in an ellipsis."""
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    lines = -(-len(pictures) // columns)
    font, line_height = _font(SMALL_SIZE), SMALL_SIZE + 4
    pitch = cell + CAPTION_LINES * line_height + 3 * GAP
    title_height = TITLE_SIZE + 2 * GAP if title else 0
    width = 2 * MARGIN + min(columns, len(pictures)) * (cell + 2 * GAP) - 2 * GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + title_height + lines * pitch - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _line(draw, (MARGIN, MARGIN), title, _font(TITLE_SIZE), INK, width - 2 * MARGIN)
    for index, (picture, caption) in enumerate(pictures):
        line, column = divmod(index, columns)
        x, y = MARGIN + column * (cell + 2 * GAP), MARGIN + title_height + line * pitch
        _mounted(sheet, picture, (x, y), cell)
        for place, text in enumerate(wrapped(caption, font, cell, CAPTION_LINES)):
            draw.text((x, y + cell + GAP + place * line_height), text, fill=INK, font=font)
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Wrap ``text`` into at most ``lines`` lines of at most ``width`` px; an ellipsis replaces what does not fit."""
    words = " ".join(text.split()).split(" ")
    result: list[str] = []
    while words and len(result) < lines:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        line, words = " ".join(words[:taken]), words[taken:]
        if font.getlength(line) > width:
            fits = max(1, _fitting(line, font, width))
            line, words = line[:fits], [line[fits:], *words]
        result.append(line)
    if words:
        result[-1] = _shortened(f"{result[-1]} {words[0]}", font, width, cut=True)
    return result


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int, end: str = "") -> int:
    """Return the number of leading characters that, followed by ``end``, are at most ``width`` px wide."""

    def length(characters: int) -> float:
        return font.getlength(text[:characters] + end)

    return max(0, bisect_right(range(len(text) + 1), float(width), key=length) - 1)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int, *, cut: bool = False) -> str:
    if not cut and font.getlength(text) <= width:
        return text
    return text[: _fitting(text, font, width, ELLIPSIS)].rstrip() + ELLIPSIS


def _caption(draw: ImageDraw.ImageDraw, place: tuple[int, int], row: Row, height: int) -> None:
    """Draw the caption with the tag below, as one block centred in the row's height."""
    font, small = _font(CAPTION_SIZE), _font(SMALL_SIZE)
    line_height = CAPTION_SIZE + 5
    tag_height = SMALL_SIZE + 8 if row.tag else 0
    room = (height - (tag_height + 6 if row.tag else 0)) // line_height
    lines = wrapped(row.caption, font, CAPTION_WIDTH, max(1, min(CAPTION_LINES, room)))
    block = len(lines) * line_height + (6 + tag_height if row.tag else 0)
    x, y = place[0], place[1] + (height - block) // 2
    for line in lines:
        draw.text((x, y + line_height / 2), line, fill=INK, font=font, anchor="lm")
        y += line_height
    if row.tag:
        y += 6
        tag = _shortened(row.tag, small, CAPTION_WIDTH - 16)
        box = [x, y, x + round(small.getlength(tag)) + 16, y + tag_height - 1]
        draw.rounded_rectangle(box, radius=tag_height / 2, fill=TAG)
        draw.text((x + 8, y + tag_height / 2), tag, fill=PAPER, font=small, anchor="lm")


def _line(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: Colour,
    width: int,
) -> None:
    draw.text(place, _shortened(text, font, width), fill=colour, font=font, anchor="lt")


def _mounted(sheet: Image.Image, picture: Picture, place: tuple[int, int], cell: int) -> None:
    """Paste the picture with a thin border, so that a white picture stands out from the background."""
    x, y = place
    ImageDraw.Draw(sheet).rectangle([x - 1, y - 1, x + cell, y + cell], outline=RULE)
    sheet.paste(_scaled(picture, cell), place)


def _scaled(picture: Picture, cell: int) -> Image.Image:
    """Scale the picture to ``cell`` px, by repeating pixels if that is a whole multiple, otherwise smoothly."""
    image = Image.fromarray(picture)
    whole = image.width == image.height and cell % image.width == 0
    return image.resize((cell, cell), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "this Pillow was built without FreeType, which draws the captions; install a wheel of Pillow"
        )
    return font


def png_bytes(sheet: Image.Image) -> bytes:
    """Return the sheet as PNG."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
