"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the file, key or row and the mend.

    Commands print it without a traceback (unless ``--debug``) and exit with code 2.
    """
