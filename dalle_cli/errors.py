"""Exceptions that end a command, and the exit code and signals of a run that stops to be resumed."""

from __future__ import annotations

import errno
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


_MENDS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give yourself the permission, or choose another place,"),
    errno.ENOMEM: "free some memory, or lower the batch size and the number of workers,",
}


def explain_system_error(error: OSError | MemoryError) -> str:
    """Return a line about a fault of the disk, the system's limits or the memory that nothing else has explained."""
    if isinstance(error, MemoryError):
        return f"the memory is full; nothing saved was lost: {_MENDS[errno.ENOMEM]} and run the same command again"
    place = "" if error.filename is None else f"{error.filename}: "
    reason = error.strerror or str(error) or type(error).__name__
    mend = _MENDS.get(error.errno or 0, "check the disk or the network")
    return f"{place}{reason}; nothing saved was lost: {mend} and run the same command again"
