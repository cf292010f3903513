"""Sizes and rates as people write them: ``16GB``, ``80GiB``, ``100Gbit``. Imports nothing heavy."""

from __future__ import annotations

import re

from dalle_cli.errors import UserError

_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """Parse the value of a command-line ``option``, a number of bytes such as ``16GB`` (decimal) or ``16GiB``.

    Raises:
        UserError: ``text`` is not a number of bytes above 0.
    """
    return int(_parse(text, "B", {**_DECIMAL, **_BINARY}, f"{option} {text}: write bytes, such as 16GB or 80GiB"))


def parse_count(text: str, option: str) -> int:
    """Parse the value of a command-line ``option``, a count such as ``250M`` or ``4000``.

    Raises:
        UserError: ``text`` is not a count above 0.
    """
    message = f"{option} {text}: write a count, such as 4000 or 250M"
    if not (count := int(_parse(text, "", _DECIMAL, message))):
        raise UserError(message)
    return count


def parse_rate(text: str, option: str) -> float:
    """Parse the value of a command-line ``option``, a rate in bits per second such as ``100Gbit`` or ``50Mbit/s``.

    Raises:
        UserError: ``text`` is not a rate above 0.
    """
    message = f"{option} {text}: write bits a second, such as 100Gbit"
    return _parse(text.strip().removesuffix("/s"), "bit", _DECIMAL, message)


def _parse(text: str, unit: str, prefixes: dict[str, int], message: str) -> float:
    found = re.fullmatch(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,15}})?) *([A-Za-z]*?){unit}", text.strip())
    if found is None or found[2] not in prefixes or not float(found[1]):
        raise UserError(message)
    return float(found[1]) * prefixes[found[2]]
