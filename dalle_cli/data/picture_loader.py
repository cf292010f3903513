"""Pictures read, decoded and cut ahead of the model by worker processes, in a given order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.batch_order import BatchOrder, Reorder
from dalle_cli.data.filters import picture_rejection
from dalle_cli.data.images import BadImage, decode_image, eval_crop, train_crop
from dalle_cli.data.source import BadSample, Source
from dalle_cli.data.workers import ignore_stop_signals
from dalle_cli.errors import UserError
from dalle_cli.randomness import numpy_generator

PREFETCH = 4
"""Batches that each worker prepares ahead."""
MOST_REPLACEMENTS = 100
"""Samples tried for one place of a batch."""


def load_eval_picture(source: Source, row: int, image_size: int, data: DataSettings) -> np.ndarray:
    """Sample ``row`` as evaluation and encoding see it: (image_size, image_size, 3) uint8.

    Raises:
        BadSample, BadImage: it cannot be read or a filter refuses it, with the reason.
    """
    return eval_crop(_whole_picture(source, row, data), image_size)


def _whole_picture(source: Source, row: int, data: DataSettings) -> Image.Image:
    image = decode_image(source.image_bytes(row), data.max_pixels)
    if (refusal := picture_rejection(image, data.filters)) is not None:
        raise BadImage(refusal)
    return image


@dataclass
class TrainingPictures:
    """Random batches of training pictures, the same for the same (seed, step) whatever the number of workers.

    A sample that cannot be read or is filtered is replaced by another one drawn from ``rows``, so that neither broken
    files end a run nor a sample beside a long run of filtered ones is seen more often than others.
    """

    source: Source
    rows: np.ndarray
    image_size: int
    data: DataSettings
    seed: int
    batch_size: int
    flip: bool
    workers: int
    part: slice = field(default_factory=lambda: slice(None))
    """What of each batch is wanted here; other processes take the rest."""

    def batches(
        self, start: int, stop: int, reorder: Reorder | None = None
    ) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        """For each update: pictures (B, 3, S, S) uint8, their rows (B,) and epochs (B,); ``reorder`` as of BatchOrder,
        which works in this process.
        """
        order = BatchOrder(self.rows, self.batch_size, self.seed, self.part, reorder)
        loader = DataLoader(
            _Items(self),
            batch_sampler=_Steps(order, start, stop),
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            collate_fn=_stack,
            worker_init_fn=_start_in_training,
        )
        iterator = iter(loader)
        try:
            yield from iterator
        except BadSample as error:  # from a worker, its message is a traceback that ends with the reason
            raise UserError(str(error).strip().splitlines()[-1].rpartition("BadSample: ")[2]) from None
        finally:
            # A traceback may keep the iterator, and so its workers; they ignore the SIGTERM that Python has for those
            # that are left when it ends, and it would wait for them for ever.
            if self.workers:
                iterator._shutdown_workers()  # type: ignore[attr-defined]

    def picture(self, row: int, epoch: int) -> tuple[np.ndarray, int]:
        """One augmented picture and the row it is of, which is ``row`` unless that cannot be read."""
        rng = numpy_generator(self.seed, "crop", epoch, row)
        candidate = row
        for _ in range(MOST_REPLACEMENTS):
            try:
                image = _whole_picture(self.source, candidate, self.data)
            except (BadSample, BadImage):
                candidate = int(self.rows[rng.integers(len(self.rows))])
                continue
            return train_crop(image, self.image_size, rng, flip=self.flip, crop=self.data.crop), candidate
        raise BadSample(
            f"{self.source.name}: {MOST_REPLACEMENTS} samples in a row from {self.source.key(row)} on cannot be read "
            "or are filtered; look at dalle scan"
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
class PictureBlock:
    """Consecutive samples of a source as encoding sees them."""

    keys: list[str]
    pictures: Tensor
    """(n, S, S, 3) uint8; zeros where a sample cannot be read. Good until the next block but one is taken."""
    reasons: dict[str, str]
    """Why, by key."""


class _Decoder(Dataset[tuple[list[str], dict[str, str]]]):
    """Decodes a range of rows into its place of ``room``, which every process sees: little is left to send."""

    def __init__(self, source: Source, ranges: list[range], room: Tensor, data: DataSettings) -> None:
        self.source, self.ranges, self.room, self.data = source, ranges, room, data

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> tuple[list[str], dict[str, str]]:
        rows = self.ranges[index]
        keys = [self.source.key(row) for row in rows]
        pictures = self.room[index % len(self.room)].numpy()
        reasons: dict[str, str] = {}
        for i, row in enumerate(rows):
            try:
                pictures[i] = load_eval_picture(self.source, row, pictures.shape[1], self.data)
            except (BadSample, BadImage) as error:
                pictures[i] = 0
                reasons[keys[i]] = str(error)
        return keys, reasons


def consecutive_pictures(
    source: Source, rows: range, *, block: int, image_size: int, data: DataSettings, workers: int, pinned: bool = False
) -> Iterator[PictureBlock]:
    """``rows`` of the source in blocks of ``block``, in order, decoded by ``workers`` processes ahead of their use.

    ``pinned``: in page-locked memory, from which a copy to a GPU need not be waited for.
    """
    ranges = [rows[at : at + block] for at in range(0, len(rows), block)]
    # Those that workers are ahead, the one being taken and the two before it, which the caller may still use.
    places = min(PREFETCH * workers + 3, len(ranges))
    room = torch.empty(places, block, image_size, image_size, 3, dtype=torch.uint8)
    if workers:
        room.share_memory_()
    loader = DataLoader(
        _Decoder(source, ranges, room, data),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=tuple,
        worker_init_fn=_one_thread,
    )
    for number, (keys, reasons) in enumerate(loader):
        pictures = room[number % places, : len(keys)]
        yield PictureBlock(keys, pictures.pin_memory() if pinned else pictures, reasons)


def _start_in_training(worker: int) -> None:
    _one_thread(worker)
    ignore_stop_signals()


def _one_thread(_: int) -> None:
    """A worker decodes; the cores' torch threads belong to the model."""
    torch.set_num_threads(1)
