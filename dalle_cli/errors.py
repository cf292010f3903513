"""Exceptions that end a command, with the exit code and signals that go with them."""

from __future__ import annotations

import signal

RESUMABLE = 75
"""Exit code of a run that a signal stopped after it saved a checkpoint: the same command resumes it.

This is EX_TEMPFAIL of sysexits.h ("try again later"), the code that a batch system's requeueing looks for.
"""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save a checkpoint and stop."""


class UserError(Exception):
    """Bad input, described by one line that names the file, key or row and the mend.

    Commands print the line without a traceback (unless ``--debug`` is given) and exit with code 2.
    """


class Stopped(Exception):
    """Training saved a checkpoint and stopped because a signal asked for it; the exit code is RESUMABLE."""
