"""Stop requests: SIGTERM, SIGUSR1 or Ctrl-C makes a run save a checkpoint and stop.

It stops after the current update or, on several GPUs, the next one. Imports nothing heavy.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from dalle_cli.errors import STOP_SIGNALS
from dalle_cli.progress import log

SECONDS_TO_STOP = 10
"""Seconds after which a signal that comes again ends a process that has not come to the end of an update."""


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C inside its block instead of letting them end the process.

    A second Ctrl-C ends the process at once, and so does the same signal once more after SECONDS_TO_STOP in which no
    update ended, since something hangs. If the run stops, the other signals stay ignored after the block, since
    batch systems may send them more than once. Outside the main thread, where Python handles no signals, it does
    nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal received."""
        self.agreed = False
        """True once all ranks have agreed to stop."""
        self._before: dict[signal.Signals, Any] = {}
        self._since: dict[int, float] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._remember) for which in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if not self.agreed:
            for which, handler in self._before.items():
                signal.signal(which, handler)

    def note_progress(self) -> None:
        """Note that an update has ended, so that nothing hangs."""
        self._since.clear()

    def _remember(self, number: int, _: object) -> None:
        waited = time.monotonic() - self._since.setdefault(number, time.monotonic())
        if waited >= SECONDS_TO_STOP and not self.agreed:
            with suppress(RuntimeError):
                log(f"stopped without saving: {waited:.0f} s after the first signal no update had ended")
            raise SystemExit(128 + number)
        if number == signal.SIGINT:
            if self.signal is not None:
                raise KeyboardInterrupt
            with suppress(RuntimeError):  # the signal came while another line was being printed
                log("Ctrl-C: saving after this update; press it again to stop at once, without saving")
        self.signal = self.signal or signal.Signals(number).name
