"""The data path of a large set: time, files and bytes of each step, reckoned from short trials on this machine."""

from __future__ import annotations

import io
import math
import random
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dalle_cli.config.schema import Recipe
from dalle_cli.data.formats.webdataset import open_indexes
from dalle_cli.data.images import decode_image
from dalle_cli.data.open_source import tar_shards
from dalle_cli.data.overlap.hashes import SIDE, hashes, thumbnail
from dalle_cli.data.overlap.pairs import near_duplicates
from dalle_cli.data.overlap.pictures import UniquePictures
from dalle_cli.data.workers import available_cores
from dalle_cli.distributed.device import choose_device, prepare_process, use_settings
from dalle_cli.dvae.encode import encode_images
from dalle_cli.dvae.model import DVAE
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.stores.row_set import RowSet
from dalle_cli.stores.tokens import rows_per_shard
from dalle_cli.text.bpe import train_bpe
from dalle_cli.text.encode import CaptionEncoder

INDEXED, DECODED, COMPARED, TOKENIZED, ENCODED, SPLIT = 2000, 16, 4000, 2000, 2, 2**20
"""Numbers of samples that each measurement works on."""
GROWTH = 1.1
"""Exponent of the number of pairs with which the look-ups of ``overlap`` grow up to a million (benchmarks/scale.md)."""
NEAR, CHECKING = 8e-9, 1e-4
"""Pairs with near hashes over the square of the number of pictures, and seconds of a core to check one, both among ten
million pictures (benchmarks/scale.md)."""
CAPTION_WORDS, WORDS = 12, 3000
"""Words of a measured caption, and different words."""
CAPTION_BYTES, KEY_BYTES = 70, 12
"""Assumed bytes of a caption and of a key."""
PICTURE_MARGIN = 1.25
"""Side of a measured picture over the recipe's."""


@dataclass(frozen=True)
class Step:
    """A step of the data path, with its work over all pairs."""

    name: str
    microseconds: float
    """Time for one pair on one core, or on the device; for ``overlap`` at the asked number of pairs."""
    hours: float
    """Hours of one core, or of the device, for all pairs."""
    elapsed: float
    """Hours from start to end with the asked number of tasks."""
    bytes: int
    """Bytes that the step leaves on the disk, before compression."""
    files: int


@dataclass(frozen=True)
class DataPath:
    """The steps from tars of pairs to the start of the prior's training."""

    pairs: int
    tasks: int
    cores: int
    """Cores of each task, as many as this machine has."""
    device: str
    """Device that encoding was measured on."""
    recipe: str
    steps: list[Step]


def plan_data_path(recipe: Recipe, pairs: int, tasks: int) -> DataPath:
    """Reckon the data path of ``pairs`` pairs in ``tasks`` jobs like this machine, after about half a minute of trials.

    The work is assumed to be shared evenly. Random pictures and captions are measured, of the recipe's sizes.
    """
    use_settings(recipe)
    device = choose_device(recipe.device)
    prepare_process(device)
    cores, shards = available_cores(), math.ceil(pairs / rows_per_shard(pairs))
    text, image, views = recipe.tokenizer.text_length, recipe.data.views * recipe.grid**2, recipe.data.views + 1
    decoding, thumbnails, compared = _decoding(recipe), *_comparing()
    indexing, index_bytes = _indexing()

    def step(name: str, seconds: float, each: float = 0, files: int = 0, workers: int = tasks * cores) -> Step:
        """Return a step of ``seconds`` a pair that leaves ``each`` bytes a pair, shared by so many workers."""
        hours = seconds * pairs / 3600
        return Step(name, 1e6 * seconds, hours, hours / workers, math.ceil(each * pairs), files)

    compared = compared * (pairs / COMPARED) ** (GROWTH - 1) + NEAR * CHECKING * pairs
    steps = [
        step("index", indexing, index_bytes, math.ceil(pairs / 10_000)),
        step("scan", decoding),
        step("overlap: read", decoding + thumbnails, 3 * SIDE**2, 2 * tasks),
        step("overlap: compare", compared, files=tasks),
        step("tokenize-text", _tokenizing(recipe), 2 * text + CAPTION_BYTES + KEY_BYTES + 2, 4 * shards),
        step("encode-images", _encoding(recipe, device), 2 * image + 1, views * shards, workers=tasks),
        step("start of prior", _splitting(recipe), 1 / 8, 1, workers=1),
    ]
    return DataPath(pairs, tasks, cores, device.type, recipe.name, steps)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _indexing() -> tuple[float, float]:
    """Return the seconds and bytes of an index, a pair."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(Path(folder) / "0.tar", "w") as tar:
            for i in range(INDEXED):
                for extension in ("jpg", "txt"):
                    header = tarfile.TarInfo(f"{i:09d}.{extension}")
                    header.size = 100
                    tar.addfile(header, io.BytesIO(bytes(100)))
        seconds = _seconds(lambda: open_indexes(tar_shards(folder), "beside"))
        beside = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file() and file.suffix != ".tar"]
    return seconds / INDEXED, sum(beside) / INDEXED


def _decoding(recipe: Recipe) -> float:
    """Return the seconds to decode a picture."""
    side = round(recipe.image_size * PICTURE_MARGIN)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    data = file.getvalue()
    return _seconds(lambda: [decode_image(data) for _ in range(DECODED)]) / DECODED


def _comparing() -> tuple[float, float]:
    """Return the seconds to make a thumbnail, and to compare one with COMPARED others, on one core."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    making = _seconds(lambda: [thumbnail(picture) for _ in range(DECODED)]) / DECODED
    coarse = rng.integers(0, 256, (COMPARED, 4, 4, 3), dtype=np.uint8)
    pictures = coarse.repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    rows = np.arange(COMPARED)

    def compare() -> None:
        near_duplicates(UniquePictures(pictures, rows, rows, hashes(pictures)), None, workers=1)

    return making, _seconds(compare) / COMPARED


def _tokenizing(recipe: Recipe) -> float:
    """Return the seconds to encode a caption, by a tokenizer trained on random words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(WORDS)]
    captions = [[" ".join(draw.choices(words, k=CAPTION_WORDS))] for _ in range(TOKENIZED)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_bpe((each for (each,) in captions), recipe.tokenizer, Path(folder))
    encoder = CaptionEncoder(tokenizer, recipe.tokenizer.model_copy(update={"overlong": "truncate"}))
    return _seconds(lambda: encoder.rows(captions)) / TOKENIZED


def _encoding(recipe: Recipe, device: torch.device) -> float:
    """Return the seconds that the device takes to encode all views of a picture."""
    model = DVAE(recipe.dvae.model).to(memory_format=torch.channels_last).to(device).eval()
    pictures = torch.zeros(ENCODED, recipe.image_size, recipe.image_size, 3, dtype=torch.uint8, device=device)

    def encode() -> None:
        encode_images(model, pictures, 0.1).cpu()

    encode()
    return _seconds(encode) / ENCODED * recipe.data.views


def _splitting(recipe: Recipe) -> float:
    """Return the seconds a row to find the rows to train on at the start."""
    rows = RowSet.full(SPLIT)
    return _seconds(lambda: split_holdout(rows, 0.001, recipe.seed)) / SPLIT
