"""WebDataset shards in which some samples are faulty in one of 13 ways.

What a fault does to its sample is stated here independently of the code that handles it.
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48
BOMB_SIDE = 30_000


@dataclass(frozen=True)
class Fault:
    """The effect of a kind of fault: whether the sample's picture or caption is skipped."""

    picture_skipped: bool = False
    caption_skipped: bool = False


FAULTS = {
    "truncated JPEG": Fault(picture_skipped=True),
    "zero bytes": Fault(picture_skipped=True),
    "wrong extension": Fault(),
    "CMYK": Fault(),
    "16-bit PNG": Fault(),
    "palette with transparency": Fault(),
    "animated GIF": Fault(),
    "animated WebP": Fault(),
    "EXIF-rotated": Fault(),
    "one pixel": Fault(picture_skipped=True),  # by the filter min_side
    "bomb": Fault(picture_skipped=True),
    "caption not UTF-8": Fault(caption_skipped=True),
    "no caption": Fault(caption_skipped=True),
}


def _picture(rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _file(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)  # type: ignore[arg-type]
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb() -> bytes:
    """Return a valid PNG of 30,000 x 30,000 black pixels, of about 100 KB."""
    packer, row = zlib.compressobj(9), bytes(1 + (BOMB_SIDE + 7) // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(BOMB_SIDE // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _faulty(kind: str, image: Image.Image, bomb_file: bytes, text: bytes) -> tuple[str, bytes, bytes | None]:
    """Return a sample with this fault: the extension, the picture's bytes and the caption's bytes."""
    jpeg = _file(image, "JPEG", quality=90)
    rgb = np.asarray(image)
    if kind == "truncated JPEG":
        return "jpg", jpeg[: len(jpeg) // 2], text
    if kind == "zero bytes":
        return "jpg", b"", text
    if kind == "wrong extension":
        return "jpg", _file(image, "PNG"), text
    if kind == "CMYK":
        return "jpg", _file(image.convert("CMYK"), "JPEG"), text
    if kind == "16-bit PNG":
        return "png", _file(Image.fromarray(rgb[..., 0].astype(np.uint16) * 257), "PNG"), text
    if kind == "palette with transparency":
        return "png", _file(image.quantize(16), "PNG", transparency=0), text
    if kind.startswith("animated"):
        file = kind.partition(" ")[2]
        second = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return file.lower(), _file(image, file, save_all=True, append_images=[second]), text
    if kind == "EXIF-rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        return "jpg", _file(image, "JPEG", exif=exif), text
    if kind == "one pixel":
        return "png", _file(image.resize((1, 1)), "PNG"), text
    if kind == "bomb":
        return "png", bomb_file, text
    if kind == "caption not UTF-8":
        return "jpg", jpeg, b"a caf\xe9 on a corner"
    if kind == "no caption":
        return "jpg", jpeg, None
    raise ValueError(kind)


def write_faulty_shards(
    folder: Path, samples: int, share: float, seed: int = 0, per_shard: int = 5000
) -> dict[str, str]:
    """Write ``samples`` samples to FOLDER/part-00000.tar and so on; return the fault of each faulty key.

    The kinds of faults take turns. Pictures come from a pool of 64, and all captions differ.
    """
    rng = np.random.default_rng(seed)
    pool = [_picture(rng) for _ in range(64)]
    files = [_file(image, "JPEG", quality=90) for image in pool]
    bomb_file, kinds = bomb(), list(FAULTS)
    at = rng.permutation(samples)[: round(samples * share)]
    fault_at = {int(index): kinds[turn % len(kinds)] for turn, index in enumerate(at)}
    several = samples > per_shard
    folder.mkdir(parents=True, exist_ok=True)
    faulty: dict[str, str] = {}
    for shard in range(-(-samples // per_shard)):
        with tarfile.open(folder / f"part-{shard:05d}.tar", "w") as tar:
            for index in range(shard * per_shard, min((shard + 1) * per_shard, samples)):
                name, which = f"{index:08d}", index % len(pool)
                text: bytes | None = f"texture {which} as number {index}".encode()
                extension, data = "jpg", files[which]
                if (kind := fault_at.get(index)) is not None:
                    extension, data, text = _faulty(kind, pool[which], bomb_file, str(text).encode())
                    faulty[f"part-{shard:05d}/{name}" if several else name] = kind
                for suffix, content in ((extension, data), ("txt", text)):
                    if content is not None:
                        member = tarfile.TarInfo(f"{name}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return faulty
