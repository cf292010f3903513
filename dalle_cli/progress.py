"""Progress of long jobs on stderr: a rich bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0
_silent = False


def silence() -> None:
    """Print nothing from now on; every rank but the first calls this."""
    global _silent
    _silent = True


def log(message: str) -> None:
    """Print a line on stderr."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


class Progress:
    """Progress of a job. The rate and the time left ignore work done before this process started."""

    def __init__(self, what: str, total: int | None, unit: str, start: int, bar: RichProgress | None) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._start = self._done = start
        self._began = self._last_line = time.monotonic()
        self._bar = bar
        self._task: TaskID | None = None
        if bar is not None:
            self._task = bar.add_task(what, total=total, completed=start, rate="", note="")
        elif start:
            log(f"{what}: resumes at {start} of {total} {unit}")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units as done, and show ``note`` behind the count."""
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{self.rate():.1f} {self.unit}/s", note=note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self.total:
            self._last_line = time.monotonic()
            log(self._line(note))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            log(message)

    def rate(self) -> float:
        """Return units per second since this process started."""
        return (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _line(self, note: str) -> str:
        of = f"/{self.total}" if self.total is not None else ""
        left = ""
        if self.total is not None and self.rate() > 0:
            left = f", {_duration((self.total - self._done) / self.rate())} left"
        return f"{self.what}: {self._done}{of} {self.unit}, {self.rate():.1f}/s{left}{'  ' + note if note else ''}"


@contextmanager
def progress(what: str, total: int | None, unit: str, start: int = 0) -> Iterator[Progress]:
    """Show the progress of the job ``what`` while the block runs; ``total`` is None if unknown, ``start`` are done."""
    if _silent or not sys.stderr.isatty():
        yield Progress(what, total, unit, start, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield Progress(what, total, unit, start, bar)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
