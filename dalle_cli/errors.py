"""Exceptions that end a command, and the exit code and signals of a run that stops to be resumed."""

from __future__ import annotations

import signal

RESUMABLE = 75
"""Exit code of a run that saved a checkpoint and stopped on a signal: EX_TEMPFAIL of sysexits.h, "try again later"."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of batch systems that ask a run to save a checkpoint and stop. Ctrl-C, SIGINT, asks for the same."""


class UserError(Exception):
    """Bad input: the message names the file, key or row and says what to do. Commands print it and exit with code 2."""


class Damaged(UserError):
    """A file of a checkpoint is missing or is not what was written; an older checkpoint may be whole."""


class Stopped(Exception):
    """Training saved a checkpoint and stopped on a signal; the exit code is RESUMABLE."""
