from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dalle_cli.data.images import BadImage, Fit, decode_image, eval_crop, squared, train_crop

# Pillow warns of damage before it raises.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> NDArray[np.uint8]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


STORED = {
    1: lambda up: up,  # top, left
    2: lambda up: up[:, ::-1],  # top, right
    3: lambda up: up[::-1, ::-1],  # bottom, right
    4: lambda up: up[::-1],  # bottom, left
    5: lambda up: up.swapaxes(0, 1),  # left, top
    6: lambda up: up[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda up: up[::-1].swapaxes(0, 1),  # left, bottom
}
"""An upright picture as it is stored under each EXIF orientation.

The standard gives the sides of the upright picture at which the stored row 0 and column 0 lie (in the comments).
"""


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(noise_image(5, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    for kind, how in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert (pixels(encoded(stored, kind, exif=exif, **how)) == upright).all()
    png = encoded(stored, "PNG", exif=exif)
    at = png.index(b"eXIf") - 4
    chunk = png[at : at + 12 + int.from_bytes(png[at : at + 4], "big")]
    assert (pixels(png.replace(chunk, b"")[:-12] + chunk + png[-12:]) == upright).all()  # EXIF after the pixels
    xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'
    assert (pixels(encoded(stored, "WEBP", lossless=True, xmp=xmp.encode())) == upright).all()


def test_damaged_exif_does_not_lose_the_picture() -> None:
    image = noise_image(5, 3)
    assert (pixels(encoded(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff")) == np.asarray(image)).all()


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 100, 51)]  # 51/255 = 1/5
    want = [(200, 0, 0), (255, 255, 255), (244, 204, 224)]
    assert pixels(encoded(Image.fromarray(rgba)))[0].tolist() == [list(rgb) for rgb in want]
    grey = Image.fromarray(np.array([[[0, 255], [0, 0], [0, 51]]], np.uint8), "LA")
    assert pixels(encoded(grey))[0, :, 0].tolist() == [0, 255, 204]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(palette, kind, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))).tolist() == [[[255] * 3]]


def test_other_modes() -> None:
    assert pixels(encoded(Image.fromarray(np.array([[True, False]]))))[0].tolist() == [[255] * 3, [0] * 3]
    sixteen = Image.fromarray(np.array([[0, 257 * 7, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        assert pixels(encoded(sixteen, kind))[0, :, 1].tolist() == [0, 7, 255]
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow make red
    for kind in ("JPEG", "TIFF"):
        red, green, blue = pixels(encoded(ink, kind))[4, 4].tolist()
        assert red > 240
        assert green < 15
        assert blue < 15
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
    ],
)
def test_a_cut_file_is_refused(kind: str, options: dict[str, object]) -> None:
    data = encoded(noise_image(40, 30), kind, **options)
    decode_image(data)
    for kept in [0, 1, 10, *range(20, len(data) - 20, 61), len(data) - 20]:
        with pytest.raises(BadImage):
            decode_image(data[:kept])


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encoded(noise_image(40, 30)))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage):
        decode_image(bytes(data))


def test_bombs_are_refused_from_the_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def bomb(width: int, height: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")

    for width, height in ((12_000, 10_000), (100_000, 100_000)):
        with pytest.raises(BadImage, match="too many pixels"):
            decode_image(bomb(width, height))
    small = encoded(noise_image(11, 10))
    assert decode_image(small, max_pixels=110).size == (11, 10)
    with pytest.raises(BadImage, match=r"too many pixels \(11 x 10, at most 109\)"):
        decode_image(small, max_pixels=109)


VALID = [encoded(noise_image(9, 7), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")]


@settings(max_examples=150)
@given(st.sampled_from(VALID), st.data())
def test_hostile_bytes_give_an_image_or_bad_image(valid: bytes, data: st.DataObject) -> None:
    broken = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    reason = None
    try:
        assert decode_image(bytes(broken), max_pixels=10_000).mode == "RGB"
    except BadImage as error:
        reason = str(error)
    assert reason != ""


@given(st.binary(max_size=200))
def test_bytes_that_are_not_an_image_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode_image(data)


@pytest.mark.parametrize("size", [16, 32])
def test_a_picture_of_the_right_size_is_left_alone(size: int) -> None:
    image = noise_image(size, size)
    assert (eval_crop(image, size) == np.asarray(image)).all()
    rng = np.random.default_rng(0)
    assert (train_crop(image, size, rng) == np.asarray(image)).all()
    assert (train_crop(image, size, rng, crop="none") == np.asarray(image)).all()


def test_eval_crop_averages_the_central_square() -> None:
    image = noise_image(60, 32)
    centre = np.asarray(image).astype(float)[:, 14:46]
    means = centre.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    got = eval_crop(image, 8)
    assert got.shape == (8, 8, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - means).max() <= 1
    assert eval_crop(noise_image(3, 5), 8).shape == (8, 8, 3)


def ramp(width: int, height: int) -> Image.Image:
    """Return a picture whose red encodes the column and whose green encodes the row."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(12, 36), (36, 12)])
def test_pictures_are_cropped_padded_or_stretched_to_squares(width: int, height: int) -> None:
    """A picture of three equal parts, red, green and blue along its longer side."""
    parts = np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 12, axis=0).swapaxes(0, 1)  # (3, 12, 3)
    pixels = np.repeat(parts.reshape(36, 1, 3), 12, axis=1)
    if width > height:
        pixels = pixels.swapaxes(0, 1)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    assert image.size == (width, height)

    def colours(fit: Fit, side: int) -> np.ndarray:
        found = eval_crop(image, side, fit)
        assert found.shape == (side, side, 3)
        return found if width > height else found.swapaxes(0, 1)  # the longer side is now axis 1

    assert (colours("crop", 12) == (0, 255, 0)).all()
    stretched = colours("stretch", 12)
    assert (stretched[:, :4] == (255, 0, 0)).all()
    assert (stretched[:, 4:8] == (0, 255, 0)).all()
    assert (stretched[:, 8:] == (0, 0, 255)).all()
    padded = colours("pad", 36)
    assert (padded[12:24, :12] == (255, 0, 0)).all()
    assert (padded[12:24, 24:] == (0, 0, 255)).all()
    assert (padded[:12] == 255).all()
    assert (padded[24:] == 255).all()
    assert squared(image, "crop") is image


def test_train_crops_vary_as_far_as_in_the_paper() -> None:
    wide, rng = ramp(800, 400), np.random.default_rng(0)
    crops = [train_crop(wide, 64, rng) for _ in range(300)]
    assert all(crop.shape == (64, 64, 3) and crop.dtype == np.uint8 for crop in crops)
    middles = np.array([crop[32, 32, 0] for crop in crops]) / 255 * 800
    # The square starts at 150 to 250, so its middle is at 350 to 450. Taking 64 of at most 72 pixels moves the middle
    # by up to 4/72 of 400.
    slack = 4 / 72 * 400 + 8
    assert 350 - slack <= middles.min() < 350
    assert 450 < middles.max() <= 450 + slack
    widths = np.array([int(crop[32, -1, 0]) - int(crop[32, 0, 0]) for crop in crops]) / 255 * 800
    assert widths.min() > 400 * 64 / 72 - 20
    assert widths.max() < 402
    assert widths.min() < 370
    assert widths.max() > 385


def test_crops_of_the_dvae_vary_as_far_as_in_the_paper() -> None:
    wide, rng = ramp(800, 400), np.random.default_rng(0)
    crops = [train_crop(wide, 64, rng, crop="anywhere") for _ in range(300)]
    assert all(crop.shape == (64, 64, 3) and crop.dtype == np.uint8 for crop in crops)
    # The square starts at 0 to 400, so its middle is at 200 to 600. It becomes 72 to 96 pixels, of which 64 are taken.
    middles = np.array([crop[32, 32, 0] for crop in crops]) / 255 * 800
    slack = 16 / 96 * 400 + 8
    assert 200 - slack <= middles.min() < 230
    assert 570 < middles.max() <= 600 + slack
    widths = np.array([int(crop[32, -1, 0]) - int(crop[32, 0, 0]) for crop in crops]) / 255 * 800
    assert 400 * 64 / 96 - 15 < widths.min() < 285
    assert 340 < widths.max() < 400 * 64 / 72 + 5
    small = ramp(40, 40)  # is neither enlarged beyond the size nor cut below it
    assert {train_crop(small, 40, rng, crop="anywhere").shape for _ in range(5)} == {(40, 40, 3)}


def test_half_of_the_pictures_are_flipped_on_request() -> None:
    image, rng = ramp(32, 32), np.random.default_rng(0)
    plain = eval_crop(image, 32)
    views = [train_crop(image, 32, rng, flip=True, crop="none") for _ in range(200)]
    flipped = [bool((view == plain[:, ::-1]).all()) for view in views]
    assert all(f or (view == plain).all() for f, view in zip(flipped, views, strict=True))
    assert 70 < sum(flipped) < 130
    assert all((train_crop(image, 32, rng, crop="none") == plain).all() for _ in range(20))


def test_the_same_random_numbers_give_the_same_crop() -> None:
    image = noise_image(90, 70)
    first, again = (train_crop(image, 32, np.random.default_rng(5), flip=True) for _ in range(2))
    assert (first == again).all()
    with pytest.raises(ValueError, match="RGB"):
        eval_crop(image.convert("L"), 32)


def _verified_by_pillow(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception:
        return False
    return True


@given(
    mode=st.sampled_from(["RGB", "RGBA", "L", "P"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=3),
    cut=st.integers(0, 60),
    more=st.binary(max_size=12),
)
@settings(max_examples=300)
def test_a_png_is_whole_where_pillow_verifies_it(
    mode: str, flips: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    data = bytearray(encoded(noise_image(7, 5).convert(mode)))
    for place, bit in flips:
        data[place % len(data)] ^= 1 << bit
    damaged = bytes(data[: len(data) - cut]) + more
    try:
        decode_image(damaged)
        whole = True
    except BadImage:
        whole = False
    if not _verified_by_pillow(damaged):
        assert not whole
    elif damaged[:8] == b"\x89PNG\r\n\x1a\n":
        assert whole
