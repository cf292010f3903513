"""Progress of long jobs on stderr: a rich bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0
WINDOW = 60.0
"""Seconds that the shown rate is a mean over."""
RECENT = 40
"""Number of steps whose median time is compared with the fastest such median so far."""
SLOWER = 2.5
"""Factor by which steady steps become slower before a warning."""
_silent = False
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of writing, and bytes of names that are not UTF-8 (surrogates).

The joiners that emoji and scripts need are not among them.
"""


def printable(text: str) -> str:
    r"""Return ``text`` with ``\x1b`` in place of an escape, and so on for all characters that could steer a terminal.

    Names and captions come from other people's data, and must not move the cursor or hide a line.
    """
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def printable_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON in which each character that could steer a terminal, see ``printable``, is an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _STEERING.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def silence() -> None:
    """Print nothing from now on; every rank but the first calls this."""
    global _silent
    _silent = True


def log(message: str) -> None:
    """Print a line on stderr; see ``printable``."""
    if not _silent:
        print(printable(message), file=sys.stderr, flush=True)


class Progress:
    """Progress of a job. The rate and the time left are those of the last minute.

    The steps of a ``steady`` job take equally long, so that it is worth a warning if they no longer do.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, start: int, bar: RichProgress | None, steady: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.steady = what, total, unit, steady
        self._done = start
        self._last_line = self._last_step = time.monotonic()
        self._marks = deque([(self._last_step, start)])
        self._steps: list[float] = []
        self._fastest = math.inf
        self._bar = bar
        self._task: TaskID | None = None
        if bar is not None:
            self._task = bar.add_task(what, total=total, completed=start, rate="", note="")
        elif start:
            log(f"{what}: resumes at {start} of {total} {unit}")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units as done, and show ``note`` behind the count."""
        self._done += count
        self._mark()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{self.rate():.1f} {self.unit}/s", note=note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self.total:
            self._last_line = time.monotonic()
            log(self._line(note))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(printable(message), markup=False, highlight=False)
        else:
            log(message)

    def rate(self) -> float:
        """Return units per second within the last WINDOW, or since this process started if that is shorter."""
        began, done = self._marks[0]
        return (self._done - done) / max(time.monotonic() - began, 1e-9)

    def _mark(self) -> None:
        """Note when a step ended; warn once if steady steps have become much slower."""
        now = time.monotonic()
        if now - self._marks[-1][0] >= 1:
            self._marks.append((now, self._done))
        while len(self._marks) > 1 and self._marks[1][0] <= now - WINDOW:
            self._marks.popleft()
        if not self.steady:
            return
        self._steps.append(now - self._last_step)
        self._last_step = now
        if len(self._steps) < RECENT:
            return
        # A median, because validations and checkpoints lengthen single steps.
        step, self._steps = sorted(self._steps)[RECENT // 2], []
        self._fastest = min(self._fastest, step)
        if step > SLOWER * self._fastest:
            self.steady = False
            self.say(
                f"{self.what}: {self.unit} take {step / self._fastest:.1f} times as long as before; if other work uses "
                "this machine's cores, stop it, or set threads to the number of free cores, or to idle"
            )

    def _line(self, note: str) -> str:
        of = f"/{self.total}" if self.total is not None else ""
        left = ""
        if self.total is not None and self.rate() > 0:
            left = f", {_duration((self.total - self._done) / self.rate())} left"
        return f"{self.what}: {self._done}{of} {self.unit}, {self.rate():.1f}/s{left}{'  ' + note if note else ''}"


@contextmanager
def progress(what: str, total: int | None, unit: str, start: int = 0, *, steady: bool = False) -> Iterator[Progress]:
    """Show the progress of the job ``what`` while the block runs; ``total`` is None if unknown, ``start`` are done.

    If all its steps take equally long, it is ``steady``, and a warning says when they become slower.
    """
    if _silent or not sys.stderr.isatty():
        yield Progress(what, total, unit, start, None, steady)
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
        yield Progress(what, total, unit, start, bar, steady)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
