"""Ending a run early and whole: SIGTERM or SIGUSR1 have it save at the end of the update in hand, and leave.

Imports nothing heavy.
"""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

from dalle_cli.errors import STOP_SIGNALS


class StopRequest:
    """Inside its block, SIGTERM and SIGUSR1 are remembered in place of ending the process.

    Also behind it where the process ``leaves``: a batch system that ends a job may send them more than once. Outside
    the main thread, where Python handles no signals, it remembers none.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        """Name of the first that came to this process."""
        self.leaves = False
        """Whether the processes have agreed to leave."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._remember) for which in STOP_SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if not self.leaves:
            for which, handler in self._before.items():
                signal.signal(which, handler)

    def _remember(self, number: int, _: object) -> None:
        self.signal = self.signal or signal.Signals(number).name
