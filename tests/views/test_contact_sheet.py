from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from dalle_cli.views.contact_sheet import BEST, FRAME, PAPER, TAG, Row, contact_sheet, side_by_side, wrapped


def flat(*colour: int, size: int = 48) -> np.ndarray:
    return np.full((size, size, 3), colour, np.uint8)


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom (exclusive) of a colour's pixels."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
    return (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else None


def test_the_best_is_framed_and_every_picture_is_there() -> None:
    row = Row("a red star", flat(200, 0, 9), [flat(0, 200, 9), flat(0, 9, 200), flat(9, 9, 9)])
    sheet = contact_sheet([row], best_label="", others_label="")
    frame, best = box(sheet, BEST), box(sheet, (200, 0, 9))
    assert frame is not None
    assert best is not None
    assert (best[2] - best[0], best[3] - best[1]) == (96, 96)
    assert frame == (best[0] - FRAME, best[1] - FRAME, best[2] + FRAME, best[3] + FRAME)
    places = [box(sheet, colour) for colour in ((0, 200, 9), (0, 9, 200), (9, 9, 9))]
    assert all(place is not None and place[2] - place[0] == 96 and place[1] == best[1] for place in places)
    lefts = [best[0], *(place[0] for place in places if place)]
    assert all(b - a >= 96 + 4 for a, b in pairwise(lefts))
    assert sheet.width > max(place[2] for place in places if place)


def test_rows_stand_below_one_another_and_only_tagged_ones_have_a_label() -> None:
    rows = [Row("one", flat(1, 2, 3)), Row("two", flat(4, 5, 6), tag="held out"), Row("three", flat(7, 8, 9))]
    sheet = contact_sheet(rows, title="title")
    tops = [place[1] for colour in ((1, 2, 3), (4, 5, 6), (7, 8, 9)) if (place := box(sheet, colour))]
    assert tops[1] - tops[0] == tops[2] - tops[1] > 96
    tag = box(sheet, TAG)
    assert tag is not None
    assert tops[1] < tag[1] < tag[3] < tops[1] + 96
    assert box(contact_sheet([rows[0]]), TAG) is None


def test_pixels_are_repeated_where_the_cell_is_a_whole_multiple() -> None:
    picture = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
    sheet = contact_sheet([Row("", picture)], best_label="")
    left, top, right, bottom = box(sheet, BEST) or (0, 0, 0, 0)
    inside = np.asarray(sheet)[top + FRAME : bottom - FRAME, left + FRAME : right - FRAME]
    np.testing.assert_array_equal(inside, picture.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("caption", ["word " * 300, "x" * 3000, "a " + "y" * 500, "WWWWWWWW " * 40])
def test_long_captions_and_tags_stay_in_their_column_and_row(caption: str) -> None:
    rows = [Row("a", flat(1, 2, 3)), Row(caption, flat(4, 5, 6), [flat(9, 8, 7)], tag="held out " * 20)]
    rows.append(Row("b", flat(7, 8, 9)))
    sheet = contact_sheet(rows, title=caption, best_label=caption, others_label=caption)
    short = contact_sheet([rows[0], Row("", *(flat(4, 5, 6), [flat(9, 8, 7)])), rows[2]], title="t")
    assert sheet.size == short.size
    difference = np.abs(np.asarray(sheet).astype(int) - np.asarray(short)).sum(-1)
    best = box(sheet, (4, 5, 6))
    assert best is not None
    row = np.s_[best[1] - FRAME : best[3] + FRAME]
    assert not difference[row, best[0] - FRAME - 8 :].any(), "text ran into the pictures"
    assert not difference[best[3] + FRAME :].any(), "text ran into the next row"
    above = box(sheet, (1, 2, 3))
    assert above is not None
    assert not difference[above[1] : best[1] - FRAME].any(), "text ran into the row before"
    assert (np.asarray(sheet)[:, -20:] == PAPER).all() or not difference[:, -20:].any()


@given(st.text(max_size=200), st.integers(20, 300), st.integers(1, 5))
@settings(max_examples=40)
def test_wrapping_keeps_to_its_width_and_loses_nothing_but_the_tail(text: str, width: int, lines: int) -> None:
    font = ImageFont.load_default(15)
    assert isinstance(font, ImageFont.FreeTypeFont)
    result = wrapped(text, font, width, lines)
    assert 1 <= len(result) <= lines
    for line in result:
        assert font.getlength(line) <= width or len(line) == 1
    plain, joined = "".join(text.split()), "".join("".join(result).split())
    if joined != plain:
        assert joined.endswith("…")
        assert plain.startswith(joined[:-1])
        assert len(result) == lines


def test_side_by_side_puts_each_reconstruction_under_its_original() -> None:
    originals = [flat(10 + i, 0, 0) for i in range(5)]
    copies = [flat(10 + i, 0, 99) for i in range(5)]
    sheet = side_by_side(originals, copies, columns=3, title="dVAE")
    for i in range(5):
        above, below = box(sheet, (10 + i, 0, 0)), box(sheet, (10 + i, 0, 99))
        assert above is not None
        assert below is not None
        assert (above[0], above[2] - above[0], above[3] - above[1]) == (below[0], 96, 96)
        assert 0 < below[1] - above[3] < 8
    first, fourth = box(sheet, (10, 0, 0)), box(sheet, (13, 0, 0))
    assert first is not None
    assert fourth is not None
    assert fourth[0] == first[0]
    assert fourth[1] > first[1] + 2 * 96
    with pytest.raises(ValueError, match="no pairs"):
        side_by_side(originals, copies[:2])


def test_an_empty_sheet_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([])
