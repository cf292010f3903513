"""Stop requests: SIGTERM, SIGUSR1 or Ctrl-C makes a run save a checkpoint after the current update and stop.

Imports nothing heavy.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any

from dalle_cli.errors import STOP_SIGNALS
from dalle_cli.progress import log


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C inside its block instead of letting them end the process.

    A second Ctrl-C ends the process at once. If the run stops, the other signals stay ignored after the block, since
    batch systems may send them more than once. Outside the main thread, where Python handles no signals, it does
    nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal received."""
        self.agreed = False
        """True once all ranks have agreed to stop."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._remember) for which in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if not self.agreed:
            for which, handler in self._before.items():
                signal.signal(which, handler)

    def _remember(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self.signal is not None:
                raise KeyboardInterrupt
            with suppress(RuntimeError):  # the signal came while another line was being printed
                log("Ctrl-C: saving after this update; press it again to stop at once, without saving")
        self.signal = self.signal or signal.Signals(number).name
