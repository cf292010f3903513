"""Reading what earlier commands wrote: each JSON value becomes a dataclass, and all that is wrong is damage by name."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from dalle_cli.errors import Damaged, UserError
from dalle_cli.stores.places import Place

T = TypeVar("T")
ABSENT = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""Numbers of errors that lie in what is read and not in its disk; libraries that find damage give none."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""A number of rows, samples or updates."""


def as_type(kind: type[T], value: Any, where: Place) -> T:
    """Return the JSON ``value`` of the file or store ``where`` as a ``kind``, such as a dataclass; drop unknown keys.

    Raises:
        Damaged: a key is missing, or a value has another type or lies outside its bounds.
    """
    try:
        found: T = _adapter(cast(Any, kind)).validate_python(value)
        return found
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        raise Damaged(f"{where}: is damaged: {place}: {first['msg'].lower()}; {_AGAIN}") from None


def read_typed(kind: type[T], file: Path) -> T:
    """Return the content of a JSON file as a ``kind``; see ``as_type``.

    Raises:
        Damaged: the file is missing, is no JSON, or holds something else.
    """
    with explain_damage(file):
        return as_type(kind, json.loads(file.read_bytes()), file)


@contextmanager
def explain_damage(where: Place) -> Iterator[None]:
    """Turn every error inside the block, which only reads ``where``, into Damaged.

    JSON can be too deep or hold too large a number, and Zarr, safetensors and their codecs raise errors of many kinds.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in ABSENT:
            raise  # the disk or the network failed, which says nothing about the file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Damaged(f"{where}: damaged or missing ({reason[:100]}); {_AGAIN}") from error


_AGAIN = "copy it again, or delete it and make it again"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
