"""What a run writes for people to look at: scalars as JSON lines and on boards, pictures on boards."""

from __future__ import annotations

import importlib.util
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from dalle_cli.errors import UserError
from dalle_cli.stores.files import explain_os_errors, write_atomically


class Board(Protocol):
    """Takes points of a run that goes on after some updates; what an earlier process gave of later ones is void."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points by name, such as ``train/loss``."""

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        """(3, H, W) uint8."""

    def flush(self) -> None:
        """Hand everything on, so that a killed process loses none of it."""

    def close(self) -> None:
        """The process ends."""


class TensorBoard:
    """``out/tensorboard/``. Points after ``start`` updates of earlier processes are voided by a mark it heeds."""

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with explain_os_errors(out):
            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self._writer.add_image(name, picture, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of ``project`` for one folder ``out``, which keeps its id in ``wandb-id``.

    Weights & Biases takes no point back: those that it has already are not sent again (they are the same, since
    updates done again are).

    Args:
        config: what it shows as the run's settings.
    """

    def __init__(self, out: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        file = out / "wandb-id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project, name=name, id=file.read_text(), resume="allow", dir=str(out), config=dict(config)
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--wandb {project}: Weights & Biases does not start ({reason}); run wandb login, or set "
                "WANDB_MODE=offline, or leave it out"
            ) from error
        self._next = self._run.step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def picture(self, step: int, name: str, picture: Tensor) -> None:
        self._log(step, {name: self._image(picture.permute(1, 2, 0).numpy())})

    def flush(self) -> None:
        """Its own process has it already."""

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._next:
            self._run.log(dict(values), step=step)


def require_wandb(project: str | None) -> None:
    """Refuse a ``project`` where Weights & Biases is not installed, before anything is done."""
    if project is None:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder that it left is not it
        raise UserError(
            f"--wandb {project}: Weights & Biases is not installed; pip install wandb, or leave it out: TensorBoard "
            "and metrics.jsonl have the same figures"
        )


_NOT_SHOWN = ("step", "seconds")


class Journal:
    """``out/metrics.jsonl`` and ``out/tensorboard/``, gone on with after ``start`` updates.

    What an earlier process wrote of later updates is dropped, since those updates are done again: lines from the
    file, points by a mark that TensorBoard heeds. With ``writes`` false nothing is written.

    Args:
        more: open further boards.
    """

    def __init__(self, out: Path, start: int, *, writes: bool = True, more: Sequence[Callable[[], Board]] = ()) -> None:
        self.lines = out / "metrics.jsonl"
        self.writes = writes
        self.boards: list[Board] = []
        self._began = time.monotonic()
        if writes:
            write_atomically(self.lines, _lines_until(self.lines, start))
            self.boards += [TensorBoard(out, start), *(open_board() for open_board in more)]

    def training(self, step: int, rate: float, scalars: Mapping[str, float]) -> None:
        """The scalars of the update that made ``step`` updates of those before."""
        seconds = round(time.monotonic() - self._began, 3)
        self._write("train", step, {"step": step, "lr": rate, "seconds": seconds, **scalars})

    def validation(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Tensor]) -> None:
        """The scalars after ``step`` updates on held-out samples, and pictures (3, H, W) uint8."""
        if not scalars:
            return
        self._write("validation", step, {"step": step, **{f"val_{name}": value for name, value in scalars.items()}})
        for board in self.boards:
            for name, picture in pictures.items():
                board.picture(step, f"validation/{name}", picture)

    def flush(self) -> None:
        """Hand everything to the operating system, so that a killed process loses none of it."""
        for board in self.boards:
            board.flush()

    def _write(self, part: str, step: int, values: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        with explain_os_errors(self.lines), self.lines.open("a") as file:
            file.write(json.dumps(values) + "\n")
        shown = {
            f"{part}/{name.removeprefix('val_')}": value for name, value in values.items() if name not in _NOT_SHOWN
        }
        for board in self.boards:
            board.scalars(step, shown)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for board in self.boards:
            board.close()


def _lines_until(path: Path, step: int) -> str:
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    return "".join(kept)
