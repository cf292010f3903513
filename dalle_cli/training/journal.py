"""What a run writes for people to look at: scalars as JSON lines and in TensorBoard, pictures in TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dalle_cli.stores.files import explain_os_errors, write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Journal:
    """``out/metrics.jsonl`` and ``out/tensorboard/``, gone on with after ``start`` updates.

    What an earlier process wrote of later updates is dropped, since those updates are done again: lines from the
    file, points by a mark that TensorBoard heeds. With ``writes`` false nothing is written.
    """

    def __init__(self, out: Path, start: int, *, writes: bool = True) -> None:
        self.lines = out / "metrics.jsonl"
        self.board: SummaryWriter | None = None
        self._began = time.monotonic()
        if not writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        write_atomically(self.lines, _lines_until(self.lines, start))
        with explain_os_errors(out):
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def training(self, step: int, rate: float, scalars: Mapping[str, float]) -> None:
        """The scalars of the update that made ``step`` updates of those before."""
        seconds = round(time.monotonic() - self._began, 3)
        self._write("train", step, {"step": step, "lr": rate, "seconds": seconds, **scalars})

    def validation(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Tensor]) -> None:
        """The scalars after ``step`` updates on held-out samples, and pictures (3, H, W) uint8."""
        if not scalars:
            return
        self._write("validation", step, {"step": step, **{f"val_{name}": value for name, value in scalars.items()}})
        if self.board is not None:
            for name, picture in pictures.items():
                self.board.add_image(f"validation/{name}", picture, step)

    def flush(self) -> None:
        """Hand everything to the operating system, so that a killed process loses none of it."""
        if self.board is not None:
            self.board.flush()

    def _write(self, part: str, step: int, values: Mapping[str, Any]) -> None:
        if self.board is None:
            return
        with explain_os_errors(self.lines), self.lines.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name not in ("step", "seconds"):
                self.board.add_scalar(f"{part}/{name.removeprefix('val_')}", value, step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.board is not None:
            self.board.close()


def _lines_until(path: Path, step: int) -> str:
    kept = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    return "".join(kept)
