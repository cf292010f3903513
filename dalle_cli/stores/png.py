"""PNG files: encoding, and the checksums that every chunk has."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = bytes.fromhex("0000000049454e44ae426082")
"""The last chunk of every PNG file."""


def encode_png(picture: NDArray[np.uint8], compress_level: int = 6) -> bytes:
    """Return a picture (H, W, 3) uint8 as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def png_damage(data: bytes) -> str | None:
    """Return what is wrong with the first chunk of a PNG that is cut short or fails its checksum; None if none is.

    What follows the pixels' last chunk is not checked; compare the end with END for that.
    """
    start = len(SIGNATURE)
    while (kind := data[start + 4 : start + 8]) != b"IEND":
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            return "truncated PNG file"
        if zlib.crc32(memoryview(data)[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return f"wrong checksum of a PNG's {kind.decode('latin-1')!r} chunk"
        start = end + 4
    return None


def has_end(file: Path) -> bool:
    """Return whether a PNG file is there and was written to its end; its checksums are not looked at."""
    try:
        with file.open("rb") as opened:
            opened.seek(-len(END), os.SEEK_END)
            return opened.read() == END
    except OSError:
        return False
