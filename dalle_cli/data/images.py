"""Decoding of untrusted image files, and the paper's crops to the model's size."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from dalle_cli.data.source import IMAGE_FORMATS, BadSample, read_image_file
from dalle_cli.errors import UserError
from dalle_cli.stores.png import png_damage

Fit = Literal["crop", "pad", "stretch"]
"""The way in which a picture that is not square becomes so."""
MAX_PIXELS = 100_000_000
"""Default number of pixels above which a picture is rejected."""

_DECODED = [name for name in IMAGE_FORMATS if name != "AVIF" or features.check("avif")]
"""The formats of IMAGE_FORMATS that this Pillow can decode."""
_EXIF_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Keys of Pillow's ``Image.info`` that may hold an orientation; a TIFF has it in its tags instead."""
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """Bytes that are not a usable image; the message is a short reason for lists of skipped samples."""


class ImageHeader(NamedTuple):
    """An image file's format (Pillow's name) and (width, height) in its header, before the EXIF orientation applies."""

    format: str
    size: tuple[int, int]


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file's first frame to RGB.

    The EXIF orientation is applied, transparent pixels are blended with white, and 16-bit values are rounded to 8 bits.

    Raises:
        BadImage: the data is not an image, or is cut short or damaged (a missing end marker alone is accepted), or the
            header states more than ``max_pixels`` pixels, which is checked before memory is allocated.
    """
    try:
        return _decode(data, max_pixels)
    except BadImage:
        raise
    except Exception as error:  # hostile bytes can make Pillow's decoders raise anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise BadImage(f"damaged image: {reason}") from error


def read_picture(path: Path, mend: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read a picture that a command names, such as a sample's PNG, as (H, W, 3) uint8.

    Raises:
        UserError: the file is missing, is not a whole picture or has more than ``max_pixels``; the message ends with
            ``mend``.
    """
    try:
        return np.asarray(decode_image(read_image_file(path), max_pixels))
    except (BadSample, BadImage) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); {mend}") from None


def read_header(data: bytes) -> ImageHeader:
    """Read an image file's header; raise BadImage if it is of none of IMAGE_FORMATS."""
    try:
        with Image.open(io.BytesIO(data), formats=_DECODED) as image:
            return ImageHeader(str(image.format), image.size)
    except Exception as error:
        raise BadImage("no image of a known format") from error


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    image = _open(data, max_pixels)
    if image.format == "PNG" and (damage := png_damage(data)) is not None:  # Pillow's verify would consume the image
        raise BadImage(f"damaged image: {damage}")
    image.load()
    orientation = _orientation(image)  # after load: Pillow turns a TIFF itself, and a PNG's EXIF may come last
    rgb = _to_rgb(image)
    if orientation in _ORIENTATIONS:
        rgb = rgb.transpose(_ORIENTATIONS[orientation])
    return rgb


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_DECODED)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limits
        raise BadImage("too many pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage("no image of a known format") from error
    if image.width * image.height > max_pixels:
        raise BadImage(f"too many pixels ({image.width} x {image.height}, at most {max_pixels})")
    return image


def _orientation(image: Image.Image) -> int:
    if not (_EXIF_KEYS & image.info.keys() or image.format == "TIFF"):  # getexif is slow even where there is no EXIF
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a picture with damaged EXIF is still a picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels: their range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("integer pixels of more than 16 bits: their range is unknown")
    grey = (values + 128) // 257
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def train_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    *,
    flip: bool = False,
    crop: Literal["none", "centre", "anywhere"] = "centre",
) -> NDArray[np.uint8]:
    """Crop an RGB image at random to (size, size, 3) uint8, as the paper does for the prior (Listing 2).

    The largest square, its offset uniform in the middle quarter of the slack, is resized by area to a random side
    between ``size`` and 9/8 of it, and a random square of side ``size`` is taken. With ``crop`` "anywhere", the paper's
    for the dVAE (Listing 1), the offset is uniform in the whole slack, and the side lies between 9/8 and 12/8 of
    ``size``. No picture is enlarged for its side. With "none", the crop is that of ``eval_crop``. ``flip`` mirrors half
    of the pictures; it is for the dVAE only, since the prior would learn mirrored writing.
    """
    if crop != "none":
        short = min(image.size)
        if crop == "centre":
            left, top = (_near_centre(side - short, rng) for side in image.size)
        else:
            left, top = (int(rng.integers(side - short + 1)) for side in image.size)
        eighths = (8, 9) if crop == "centre" else (9, 12)
        shortest, longest = (max(size, min(short, round(size * count / 8))) for count in eighths)
        side = int(rng.integers(shortest, longest + 1))
        picture = _resized_square(image, left, top, side)
        x, y = (int(rng.integers(side - size + 1)) for _ in range(2))
        picture = picture[y : y + size, x : x + size]
    else:
        picture = eval_crop(image, size)
    if flip and rng.random() < 0.5:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)


def squared(image: Image.Image, fit: Fit) -> Image.Image:
    """Return a picture as it is for "crop"; else make it square, by white bars ("pad") or by stretching ("stretch").

    A stretched picture has its shorter side; the longer one is averaged down to it.
    """
    if fit == "crop" or image.width == image.height:
        return image
    if fit == "stretch":
        short = min(image.size)
        return image.resize((short, short), Image.Resampling.BOX)
    side = max(image.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def eval_crop(image: Image.Image, size: int, fit: Fit = "crop") -> NDArray[np.uint8]:
    """Crop an RGB image, ``squared`` first, to its central square, resized by area: (size, size, 3) uint8."""
    image = squared(image, fit)
    short = min(image.size)
    return _resized_square(image, (image.width - short) // 2, (image.height - short) // 2, size)


def _near_centre(slack: int, rng: np.random.Generator) -> int:
    """Return a random offset in the middle quarter of ``slack``."""
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def _resized_square(image: Image.Image, left: int, top: int, side: int) -> NDArray[np.uint8]:
    """Resize the largest square with this corner to ``side``, by area average down or by bicubic interpolation up."""
    short = min(image.size)
    method = Image.Resampling.BOX if side <= short else Image.Resampling.BICUBIC
    box = (left, top, left + short, top + short)
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, not {image.mode}")
    if image.size != (side, side):  # avoids a copy by Pillow
        image = image.resize((side, side), method, box=box)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(side, side, 3)
