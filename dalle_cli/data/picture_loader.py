"""Loaders whose worker processes read, decode and crop pictures before the model needs them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.batch_order import BatchOrder, Order, Reorder
from dalle_cli.data.filters import picture_rejection
from dalle_cli.data.images import BadImage, decode_image, eval_crop, squared, train_crop
from dalle_cli.data.read_ahead import on_server, rows_ahead
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import AFRESH, explain_lost_workers, ignore_stop_signals, lost_worker
from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.row_set import RowSet

PREFETCH = 4
"""Number of batches that each worker prefetches."""
PATIENCE = 600
"""Seconds that training waits for a batch of its worker processes before it gives up."""
SHARED_MEMORY = Path("/dev/shm")
"""Folder of the memory in which worker processes pass on pictures."""
MAX_REPLACEMENTS = 100
"""Number of samples tried for one place of a batch before training gives up."""


def load_eval_picture(source: Source, row: int, image_size: int, data: DataSettings) -> np.ndarray:
    """Load the picture of sample ``row``, cropped for evaluation and encoding: (image_size, image_size, 3) uint8.

    Raises:
        BadSample, BadImage: the picture cannot be read or a filter rejects it; the message is the reason.
    """
    return eval_crop(_load_filtered(source, row, data), image_size)


def load_views(source: Source, row: int, image_size: int, data: DataSettings, seed: int) -> np.ndarray:
    """Load the picture of sample ``row`` in ``data.views`` crops, (views, image_size, image_size, 3) uint8.

    The first is that of ``load_eval_picture``; the others are random crops that depend on (seed, row, view) alone.

    Raises:
        BadSample, BadImage: see ``load_eval_picture``.
    """
    image = _load_filtered(source, row, data)
    rngs = [numpy_generator(seed, "view", row, view) for view in range(1, data.views)]
    return np.stack([eval_crop(image, image_size), *(train_crop(image, image_size, rng) for rng in rngs)])


def _load_filtered(source: Source, row: int, data: DataSettings) -> Image.Image:
    image = decode_image(source.image_bytes(row), data.max_pixels)
    if (reason := picture_rejection(image, data.filters)) is not None:
        raise BadImage(reason)
    return squared(image, data.fit)


class PictureBatch(NamedTuple):
    """Training pictures (B, S, S, 3) uint8 of one update, with the row and the epoch (B,) of each."""

    pictures: Tensor
    rows: np.ndarray
    epochs: np.ndarray
    replaced: float
    """Share of the pictures that are others than those drawn first; see ``TrainingPictures``."""


@dataclass
class TrainingPictures:
    """Random batches of training pictures, a function of (seed, step) whatever the number of workers.

    A sample that cannot be read or that a filter rejects is replaced by one drawn from all rows. So broken files do not
    end a run, and the sample after a long series of rejected ones is not seen more often than others.
    """

    source: Source
    rows: RowSet
    """Rows to train on."""
    image_size: int
    data: DataSettings
    seed: int
    batch_size: int
    """Number of pictures in the batch of all ranks."""
    flip: bool
    workers: int
    """Number of worker processes; 0 loads in this process."""
    crop: Literal["centre", "anywhere"] = "centre"
    """Random crops of ``train_crop``, unless ``data.crop`` is false."""
    part: slice = field(default_factory=lambda: slice(None))
    """This rank's slice of each batch."""

    def batches(
        self, start: int, stop: int, order: Order = "random blocks", reorder: Reorder | None = None
    ) -> Iterator[PictureBatch]:
        """Yield the batches of updates ``start`` to ``stop``; ``reorder`` (see BatchOrder) runs in this process."""
        batch_order = BatchOrder(self.rows, self.batch_size, self.seed, self.part, reorder, order)
        if self.workers:
            own = len(range(*self.part.indices(self.batch_size)))
            _require_shared_memory(own * 3 * self.image_size**2 * (PREFETCH * self.workers + 2))
        loader = DataLoader(
            _AugmentedPictures(self),
            batch_sampler=_BatchSampler(batch_order, start, stop),
            num_workers=self.workers,
            multiprocessing_context=_start_of_workers(self.source, self.workers),
            prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_collate,
            worker_init_fn=_start_training_worker,
            timeout=PATIENCE if self.workers else 0,
        )
        with explain_lost_workers(), _workers_of(iter(loader)) as batches:
            yield from batches

    def picture(self, row: int, epoch: int) -> tuple[np.ndarray, int]:
        """Load and augment a picture (image_size, image_size, 3) uint8; return it and its row, replaced if necessary.

        Raises:
            BadSample: none of MAX_REPLACEMENTS samples can be used.
        """
        rng = numpy_generator(self.seed, "crop", epoch, row)
        candidate = row
        for _ in range(MAX_REPLACEMENTS):
            try:
                image = _load_filtered(self.source, candidate, self.data)
            except (BadSample, BadImage):
                candidate = int(self.rows.take(rng.integers(len(self.rows), size=1))[0])
                continue
            crop = self.crop if self.data.crop else "none"
            return train_crop(image, self.image_size, rng, flip=self.flip, crop=crop), candidate
        raise BadSample(
            f"{self.source.name}: {MAX_REPLACEMENTS} samples drawn for {self.source.key(row)} cannot be read or are "
            "filtered out; run dalle scan to see why"
        )


class _AugmentedPictures(Dataset[tuple[np.ndarray, int, int, bool]]):
    """Items (picture, row, epoch, whether it was replaced) by (row, epoch)."""

    def __init__(self, pictures: TrainingPictures) -> None:
        self.pictures = pictures

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int, int, bool]:
        row, epoch = item
        picture, used = self.pictures.picture(row, epoch)
        return picture, used, epoch, used != row

    def __getitems__(self, items: list[tuple[int, int]]) -> list[tuple[np.ndarray, int, int, bool]]:
        """Return the items of a batch, which torch asks for by this name."""
        upcoming = rows_ahead(self.pictures.source, [row for row, _ in items], "images")
        return [self[item] for item, _ in zip(items, upcoming, strict=True)]


@dataclass
class _BatchSampler:
    """The (row, epoch) pairs of each batch from ``start`` to ``stop``."""

    order: BatchOrder
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            rows, epochs = self.order.batch(step)
            yield list(zip(rows.tolist(), epochs.tolist(), strict=True))

    def __len__(self) -> int:
        return self.stop - self.start


def _collate(items: Sequence[tuple[np.ndarray, int, int, bool]]) -> PictureBatch:
    pictures, rows, epochs, replaced = zip(*items, strict=True)
    return PictureBatch(
        torch.from_numpy(np.stack(pictures)), np.array(rows), np.array(epochs), sum(replaced) / len(replaced)
    )


@dataclass
class PictureBlock:
    """Consecutive samples of a source, cropped for encoding."""

    keys: list[str]
    pictures: Tensor
    """(n, views, S, S, 3) uint8, zeros where a sample cannot be used; the memory is reused two blocks later."""
    reasons: dict[str, str]
    """Why a sample cannot be used, by key."""


class _BlockDecoder(Dataset[tuple[list[str], dict[str, str]]]):
    """Decodes block i into slot i mod slots of ``buffer`` (slots, block, views, S, S, 3) in shared memory."""

    def __init__(self, source: Source, rows: range, buffer: Tensor, data: DataSettings, seed: int) -> None:
        self.source, self.rows, self.buffer, self.data, self.seed = source, rows, buffer, data, seed

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.buffer.shape[1])

    def __getitem__(self, index: int) -> tuple[list[str], dict[str, str]]:
        block = self.buffer.shape[1]
        rows = self.rows[index * block : (index + 1) * block]
        keys = [self.source.key(row) for row in rows]
        pictures = self.buffer[index % len(self.buffer)].numpy()
        reasons: dict[str, str] = {}
        for i, row in enumerate(rows_ahead(self.source, rows, "images")):
            try:
                pictures[i] = load_views(self.source, row, pictures.shape[2], self.data, self.seed)
            except (BadSample, BadImage) as error:
                pictures[i] = 0
                reasons[keys[i]] = str(error)
        return keys, reasons


def consecutive_pictures(
    source: Source,
    rows: range,
    *,
    block: int,
    image_size: int,
    data: DataSettings,
    seed: int,
    workers: int,
    pinned: bool = False,
) -> Iterator[PictureBlock]:
    """Yield the pictures of ``rows`` in order, in blocks that worker processes prefetch.

    A block has ``block`` samples. ``seed`` is that of the random crops, if ``data.views`` asks for any. Without
    ``workers``, this process decodes. ``pinned`` puts pictures into page-locked memory, from which a copy to a GPU is
    asynchronous.
    """
    # One slot for each prefetched block, the block being yielded, and the two before it that the caller may still use.
    slots = min(PREFETCH * workers + 3, math.ceil(len(rows) / block))
    if workers:
        _require_shared_memory(slots * block * data.views * 3 * image_size**2)
    buffer = torch.empty(slots, block, data.views, image_size, image_size, 3, dtype=torch.uint8)
    if workers:
        buffer.share_memory_()
    loader = DataLoader(
        _BlockDecoder(source, rows, buffer, data, seed),
        batch_size=None,
        multiprocessing_context=_start_of_workers(source, workers),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=tuple,
        worker_init_fn=_use_one_thread,
        timeout=PATIENCE if workers else 0,
    )
    with explain_lost_workers(), _workers_of(iter(loader)) as decoded:
        for number, (keys, reasons) in enumerate(decoded):
            pictures = buffer[number % slots, : len(keys)]
            yield PictureBlock(keys, pictures.pin_memory() if pinned else pictures, reasons)


def _start_of_workers(source: Source, workers: int) -> str | None:
    """Return the way to start worker processes; None is Python's own, and for this process alone."""
    return AFRESH if workers and on_server(source) else None


def _require_shared_memory(wanted: int) -> None:
    """Check that worker processes can pass on ``wanted`` bytes of pictures; if they cannot, they are killed or hang.

    Raises:
        UserError: the system has less shared memory free, as containers often do.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else wanted
    if free < wanted:
        raise UserError(
            f"{SHARED_MEMORY}: has {free / 1e6:.0f} MB free, and pictures from worker processes take up to "
            f"{wanted / 1e6:.0f} MB; give the container more (docker run --shm-size 1g), or set training.workers to 0"
        )


@contextmanager
def _workers_of(iterator: Any) -> Iterator[Any]:
    """Use the iterator of a DataLoader inside the block, then end its worker processes, if it has any.

    Raises:
        UserError: a worker process met a fault of the data.
    """
    try:
        yield iterator
    except (BadSample, UserError) as error:
        raise UserError(_reason(error)) from None
    except (EOFError, ConnectionResetError):
        raise lost_worker("it ended while it passed on pictures") from None
    finally:
        # A traceback may keep the iterator, and so its workers, alive. At exit Python sends them a SIGTERM, which they
        # may ignore, and would then wait for them forever.
        if hasattr(iterator, "_shutdown_workers"):
            with suppress(RuntimeError):  # torch tells of a killed worker at any moment, also of this one
                iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()
                worker.join(timeout=5)


def _reason(error: Exception) -> str:
    """Return the message of an error; one of a worker process is a traceback, whose last line has class and message."""
    return re.sub(r"^[\w.]+: ", "", str(error).strip().splitlines()[-1]) if "Traceback" in str(error) else str(error)


def _start_training_worker(worker: int) -> None:
    _use_one_thread(worker)
    ignore_stop_signals()


def _use_one_thread(_: int) -> None:
    """Limit a worker to one torch thread: it only decodes, and the cores belong to the model."""
    torch.set_num_threads(1)
