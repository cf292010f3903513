"""Image files to pictures of the model's size: decoding of untrusted bytes, and the paper's preprocessing."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dalle_cli.data.source import BadSample, read_image_file
from dalle_cli.errors import UserError

# Named rather than left to Pillow: some of its other formats start programs (EPS) or are barely maintained.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_EXIF_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Where Pillow's ``Image.info`` may hold an orientation, TIFF's own tags apart."""
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
    """Bytes that are no usable image; the message is a short reason for lists of skipped samples."""


def decode_image(data: bytes, max_pixels: int = 100_000_000) -> Image.Image:
    """An image file's first frame as RGB: turned as EXIF says, transparency on white, 16 bits cut to 8.

    Raises BadImage for anything not whole (no image, cut short, damaged) and for more than `max_pixels`
    pixels (refused from the header, before memory is taken). What misses nothing but its end marker is whole.
    """
    try:
        return _decode(data, max_pixels)
    except BadImage:
        raise
    except Exception as error:  # hostile bytes make Pillow's decoders fail in every way there is
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise BadImage(f"damaged image: {reason}") from error


def read_picture(path: Path, mend: str, max_pixels: int = 100_000_000) -> NDArray[np.uint8]:
    """Read a picture that a command names, such as a sample's PNG, as (H, W, 3) uint8.

    Raises:
        UserError: the file is missing, no whole picture or of more than ``max_pixels``; the line ends with ``mend``.
    """
    try:
        return np.asarray(decode_image(read_image_file(path), max_pixels))
    except (BadSample, BadImage) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}); {mend}") from None


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height by the file's header, as stored (before EXIF turns it). Raises BadImage without one."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception as error:
        raise BadImage("no image of a known format") from error


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    image = _open(data, max_pixels)
    if image.format == "PNG":
        _check_chunks(data)
    image.load()
    orientation = _orientation(image)  # what is left of it: Pillow turns a TIFF itself, and a PNG's EXIF may come last
    rgb = _to_rgb(image)
    if orientation in _ORIENTATIONS:
        rgb = rgb.transpose(_ORIENTATIONS[orientation])
    return rgb


def _open(data: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limits
        raise BadImage("too many pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage("no image of a known format") from error
    if image.width * image.height > max_pixels:
        raise BadImage(f"too many pixels ({image.width} x {image.height}, at most {max_pixels})")
    return image


def _check_chunks(data: bytes) -> None:
    """Refuse a PNG with a chunk that is cut short or fails its checksum, as Pillow's ``verify`` would, which uses up
    the image and so has it opened twice.
    """
    at = 8  # behind the signature
    while (kind := data[at + 4 : at + 8]) != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            raise BadImage("damaged image: truncated PNG file")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage(f"damaged image: wrong checksum of a PNG's {kind.decode('latin-1')!r} chunk")
        at = end + 4


def _orientation(image: Image.Image) -> int:
    if not (_EXIF_KEYS & image.info.keys() or image.format == "TIFF"):  # Pillow takes longer to find nothing
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
    image: Image.Image, size: int, rng: np.random.Generator, *, flip: bool = False, crop: bool = True
) -> NDArray[np.uint8]:
    """The paper's training view of an RGB image, (size, size, 3) uint8.

    The largest square there is, its offset random in the middle quarter of the room; resized
    by area to a random side between `size` and 9/8 of it (never enlarged for that); a random `size` square of
    that; with `flip`, mirrored half of the time (for the dVAE only: the prior would learn mirrored writing).
    With `crop` false the view is that of `eval_crop`, and only the flip is random.
    """
    if crop:
        short = min(image.size)
        left, top = (_near_centre(side - short, rng) for side in image.size)
        longest = max(size, min(short, round(size * 9 / 8)))
        side = int(rng.integers(size, longest + 1))
        picture = _resized_square(image, left, top, side)
        x, y = (int(rng.integers(side - size + 1)) for _ in range(2))
        picture = picture[y : y + size, x : x + size]
    else:
        picture = eval_crop(image, size)
    if flip and rng.random() < 0.5:
        picture = picture[:, ::-1]
    return np.ascontiguousarray(picture)


def eval_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of an RGB image resized by area, (size, size, 3) uint8; unchanged if it fits."""
    short = min(image.size)
    return _resized_square(image, (image.width - short) // 2, (image.height - short) // 2, size)


def _near_centre(room: int, rng: np.random.Generator) -> int:
    low = 3 * room // 8
    return int(rng.integers(low, max(low + 1, 5 * room // 8)))


def _resized_square(image: Image.Image, left: int, top: int, side: int) -> NDArray[np.uint8]:
    """The largest square with this corner, resized to `side`: area average down, bicubic up."""
    short = min(image.size)
    method = Image.Resampling.BOX if side <= short else Image.Resampling.BICUBIC
    box = (left, top, left + short, top + short)
    if image.mode != "RGB":
        raise ValueError(f"an RGB image is wanted, not {image.mode}")
    if image.size != (side, side):  # else Pillow would copy it
        image = image.resize((side, side), method, box=box)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(side, side, 3)
