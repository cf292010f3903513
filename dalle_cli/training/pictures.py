"""Pictures read, decoded and cut ahead of the model by worker processes, in a given order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_cli.data.images import BadImage, decode_image, eval_crop, train_crop
from dalle_cli.data.sources import BadSample, Source
from dalle_cli.errors import UserError
from dalle_cli.recipes.schema import DataSettings
from dalle_cli.training.order import BatchOrder
from dalle_cli.training.randomness import numpy_generator

PREFETCH = 4
"""Batches that each worker prepares ahead."""


def cut_picture(source: Source, row: int, image_size: int, data: DataSettings) -> np.ndarray:
    """Sample ``row`` as evaluation and encoding see it: (image_size, image_size, 3) uint8.

    Raises:
        BadSample, BadImage: it cannot be read, with the reason.
    """
    return eval_crop(decode_image(source.image_bytes(row), data.max_pixels), image_size)


@dataclass
class TrainingPictures:
    """Random batches of training pictures, the same for the same (seed, step) whatever the number of workers.

    A sample that cannot be read is replaced by the next one of ``rows``, so that a few broken files do not end a run.
    """

    source: Source
    rows: np.ndarray
    image_size: int
    data: DataSettings
    seed: int
    batch_size: int
    flip: bool
    workers: int

    def batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """For each update: pictures (B, 3, S, S) uint8, their rows (B,) and epochs (B,)."""
        order = BatchOrder(self.rows, self.batch_size, self.seed)
        loader = DataLoader(
            _Items(self),
            batch_sampler=_Steps(order, start, stop),
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_stack,
            worker_init_fn=_one_thread,
        )
        try:
            yield from loader
        except BadSample as error:  # from a worker, its message is a traceback that ends with the reason
            raise UserError(str(error).strip().splitlines()[-1].rpartition("BadSample: ")[2]) from None

    def picture(self, row: int, epoch: int) -> tuple[np.ndarray, int]:
        """One augmented picture and the row it is of, which is ``row`` unless that cannot be read."""
        place = int(np.searchsorted(self.rows, row))
        for attempt in range(min(len(self.rows), 100)):
            candidate = int(self.rows[(place + attempt) % len(self.rows)])
            rng = numpy_generator(self.seed, "crop", epoch, row)
            try:
                image = decode_image(self.source.image_bytes(candidate), self.data.max_pixels)
            except (BadSample, BadImage):
                continue
            return train_crop(image, self.image_size, rng, flip=self.flip, crop=self.data.crop), candidate
        raise BadSample(
            f"{self.source.name}: {attempt + 1} samples in a row from {self.source.key(row)} on cannot be read"
        )


class _Items(Dataset[tuple[np.ndarray, int, int]]):
    def __init__(self, pictures: TrainingPictures) -> None:
        self.pictures = pictures

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int, int]:
        row, epoch = item
        picture, used = self.pictures.picture(row, epoch)
        return picture, used, epoch


@dataclass
class _Steps:
    order: BatchOrder
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            rows, epochs = self.order.batch(step)
            yield list(zip(rows.tolist(), epochs.tolist(), strict=True))

    def __len__(self) -> int:
        return self.stop - self.start


def _stack(items: Sequence[tuple[np.ndarray, int, int]]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    pictures = torch.from_numpy(np.stack([picture for picture, _, _ in items])).permute(0, 3, 1, 2)
    return pictures, np.array([row for _, row, _ in items]), np.array([epoch for _, _, epoch in items])


@dataclass
class Block:
    """Consecutive samples of a source as encoding sees them."""

    keys: list[str]
    pictures: Tensor
    """(n, S, S, 3) uint8; zeros where a sample cannot be read."""
    reasons: dict[str, str]
    """Why, by key."""


class _Blocks(Dataset[Block]):
    def __init__(self, source: Source, start: int, size: int, image_size: int, data: DataSettings) -> None:
        self.source, self.image_size, self.data = source, image_size, data
        self.ranges = [range(at, min(at + size, len(source))) for at in range(start, len(source), size)]

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> Block:
        rows = self.ranges[index]
        keys = [self.source.key(row) for row in rows]
        pictures = np.zeros((len(rows), self.image_size, self.image_size, 3), np.uint8)
        reasons: dict[str, str] = {}
        for i, row in enumerate(rows):
            try:
                pictures[i] = cut_picture(self.source, row, self.image_size, self.data)
            except (BadSample, BadImage) as error:
                reasons[keys[i]] = str(error)
        return Block(keys, torch.from_numpy(pictures), reasons)


def consecutive_pictures(
    source: Source, start: int, *, block: int, image_size: int, data: DataSettings, workers: int
) -> Iterator[Block]:
    """Blocks of ``block`` samples from ``start`` to the source's end, in order, decoded by ``workers`` processes."""
    yield from DataLoader(
        _Blocks(source, start, block, image_size, data),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    """A worker decodes; the cores' torch threads belong to the model."""
    torch.set_num_threads(1)
