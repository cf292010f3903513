"""The journal of a run: metrics as JSON lines, and metrics and images for TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from dalle_cli.errors import UserError
from dalle_cli.stores.files import (
    append_json_line,
    delete_unfinished,
    explain_os_errors,
    read_json_lines,
    sync,
    write_atomically,
)
from dalle_cli.stores.png import encode_png

PICTURES = "validation"
"""Folder, in a run of a stage, of pictures named after the update of their validation."""
_UPDATE = re.compile(r".+-([0-9]{8,15})")
"""Name of a picture, without its extension, that ends with its update."""
_NOT_LOGGED = ("step", "seconds")
"""Keys of a JSON line that are not passed to the loggers."""


class Journal:
    """Writes a run's metrics to ``out/metrics.jsonl``, ``out/tensorboard/`` and further loggers, pictures to PICTURES.

    A resumed run repeats the updates after its checkpoint, ``start``, so their earlier records are dropped: lines and
    pictures are deleted, and a marker voids points in TensorBoard. Ranks other than the leader write nothing.
    """

    def __init__(
        self, out: Path, start: int, *, writes: bool = True, more: Sequence[Callable[[], MetricLogger]] = ()
    ) -> None:
        self.lines = out / "metrics.jsonl"
        self.pictures = out / PICTURES
        self.writes = writes
        self.loggers: list[MetricLogger] = []
        self._began = time.monotonic()
        if writes:
            write_atomically(self.lines, _lines_until(self.lines, start))
            for folder in (out, self.pictures):
                delete_unfinished(folder)
            for update, picture in pictures_of(out):
                if update > start:
                    picture.unlink()
            self.loggers += [TensorBoardLogger(out, start), *(open_logger() for open_logger in more)]

    def log_training(self, step: int, rate: float, scalars: Mapping[str, float]) -> None:
        """Write the scalars and the learning rate of update ``step``, counted from 1."""
        seconds = round(time.monotonic() - self._began, 3)
        self._write("train", step, {"step": step, "lr": rate, "seconds": seconds, **scalars})

    def log_validation(self, step: int, scalars: Mapping[str, float], images: Mapping[str, Tensor]) -> None:
        """Write the held-out scalars after ``step`` updates, and images (3, H, W) uint8, those as PNG files too."""
        if not scalars:
            return
        self._write("validation", step, {"step": step, **{f"val_{name}": value for name, value in scalars.items()}})
        for name, image in images.items():
            if self.writes:
                write_atomically(self.pictures / f"{name}-{step:08d}.png", encode_png(image.permute(1, 2, 0).numpy()))
            for logger in self.loggers:
                logger.log_image(step, f"validation/{name}", image)

    def flush(self) -> None:
        """Pass everything on, so that a killed process loses nothing; have the JSON lines on the disk.

        Otherwise, after a power cut, a run might resume from a checkpoint whose updates have no lines.
        """
        for logger in self.loggers:
            logger.flush()
        if self.writes:
            with explain_os_errors(self.lines):
                sync(self.lines)

    def _write(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        with explain_os_errors(self.lines):
            append_json_line(self.lines, values)
        scalars = {
            f"{prefix}/{name.removeprefix('val_')}": value for name, value in values.items() if name not in _NOT_LOGGED
        }
        for logger in self.loggers:
            logger.log(step, scalars)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for logger in self.loggers:
            logger.close()


def pictures_of(run: Path, name: str = "*") -> list[tuple[int, Path]]:
    """Return the pictures ``name`` of a run's validations, each with its update, ascending; others are the user's."""
    found = ((_UPDATE.fullmatch(picture.stem), picture) for picture in (run / PICTURES).glob(f"{name}-*.png"))
    return sorted((int(update[1]), picture) for update, picture in found if update is not None)


def _lines_until(path: Path, step: int) -> str:
    """Return the file's lines about updates up to ``step``."""
    kept = (line for line in read_json_lines(path) if isinstance(line.get("step"), int) and line["step"] <= step)
    return "".join(f"{json.dumps(line)}\n" for line in kept)


class MetricLogger(Protocol):
    """Records metrics and images by the number of updates done."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars by name, such as ``train/loss``."""

    def log_image(self, step: int, name: str, image: Tensor) -> None:
        """Record an image (3, H, W) uint8."""

    def flush(self) -> None:
        """Pass everything on, so that a killed process loses nothing."""

    def close(self) -> None:
        """End the recording when training ends."""


class TensorBoardLogger:
    """Records to ``out/tensorboard/``, with a marker that voids what earlier processes wrote after ``start``."""

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with explain_os_errors(out):
            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: Tensor) -> None:
        self._writer.add_image(name, image, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Records to one run of Weights & Biases, whose id is in ``out/wandb-id``; raises UserError if it does not start.

    Weights & Biases cannot delete points, so a resumed run does not send repeated updates, whose values are the same.
    """

    def __init__(self, out: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        file = out / "wandb-id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=file.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(out),
                config=dict(config),
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--wandb {project}: Weights & Biases does not start ({reason}); run wandb login, set "
                "WANDB_MODE=offline, or leave --wandb out"
            ) from error
        self._next = self._run.step

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)

    def log_image(self, step: int, name: str, image: Tensor) -> None:
        self.log(step, {name: self._image(image.permute(1, 2, 0).numpy())})

    def flush(self) -> None:
        """Do nothing: the process of Weights & Biases already has everything."""

    def close(self) -> None:
        self._run.finish()


def require_wandb(project: str | None) -> None:
    """Raise UserError if a ``project`` is given and Weights & Biases is not installed."""
    if project is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a run's folder ./wandb is found too, but is no package
        raise UserError(
            f"--wandb {project}: Weights & Biases is not installed; pip install wandb, or leave --wandb out: "
            "TensorBoard and metrics.jsonl have the same values"
        )
