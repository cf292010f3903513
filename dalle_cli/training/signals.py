"""Stop requests: SIGTERM or SIGUSR1 makes a run save a checkpoint after the current update and stop.

Imports nothing heavy.
"""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

from dalle_cli.errors import STOP_SIGNALS


class StopRequest:
    """Remembers SIGTERM and SIGUSR1 inside its block instead of letting them end the process.

    If the run stops, the signals stay ignored after the block, since batch systems may send them more than once.
    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first signal received."""
        self.agreed = False
        """True once all ranks have agreed to stop."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._remember) for which in STOP_SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if not self.agreed:
            for which, handler in self._before.items():
                signal.signal(which, handler)

    def _remember(self, number: int, _: object) -> None:
        self.signal = self.signal or signal.Signals(number).name
