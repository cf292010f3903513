"""What a run writes for people to look at: scalars as JSON lines and on boards, pictures on boards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from dalle_cli.stores.files import explain_os_errors, write_atomically
from dalle_cli.training.boards import Board, TensorBoard

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
