"""Results of shares (``--shard I/N``) as files of one folder, which the job that finds all of them there joins."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from dalle_cli.errors import UserError
from dalle_cli.stores.files import explain_os_errors, write_atomically
from dalle_cli.stores.shards import Shard

T = TypeVar("T")


class ShareFiles(Generic[T]):
    """The results of ``of`` shares in ``folder``, each with what it was made of.

    Raises:
        UserError: ``folder`` has shares of another number, or cannot be written.
    """

    def __init__(self, folder: Path, of: int, made_of: dict[str, Any], kind: TypeAdapter[T]) -> None:
        self.folder, self.made_of, self.kind = folder, made_of, kind
        self.shards = [Shard(number, of) for number in range(1, of + 1)]
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        names = (re.fullmatch(r"\d+-of-(\d+)\.json", file.name) for file in folder.iterdir())
        if {int(name[1]) for name in names if name is not None} - {of}:
            raise UserError(f"{folder}: holds shares of another number than {of}; delete it, or keep to that number")

    def read(self) -> dict[Shard, T | None]:
        """Return the result of each share, None if it is not there.

        Raises:
            UserError: a share was made of something else, or is damaged.
        """
        return {shard: self._read(shard) for shard in self.shards}

    def read_with(self, shard: Shard, make: Callable[[], T]) -> dict[Shard, T | None]:
        """Return what ``read`` does, once the result of ``shard`` is there, which ``make`` makes if it is not.

        Raises:
            UserError: see ``read``.
        """
        found = self.read()
        if found[shard] is None:
            self.write(shard, make())
            found = self.read()  # others may have been made meanwhile
        return found

    def write(self, shard: Shard, result: T) -> None:
        """Write the result of a share; equal results make equal files."""
        dumped = self.kind.dump_python(result, mode="json")
        write_atomically(
            self._file(shard), json.dumps({"made_of": self.made_of, "sha256": hash_of(dumped), "result": dumped})
        )

    def _file(self, shard: Shard) -> Path:
        return self.folder / f"{shard.number:04d}-of-{shard.of:04d}.json"

    def _read(self, shard: Shard) -> T | None:
        file = self._file(shard)
        if not file.is_file():
            return None
        try:
            with explain_os_errors(file):
                found = json.loads(file.read_bytes())
            there, result = dict(found["made_of"]), self.kind.validate_python(found["result"])
            if found["sha256"] != hash_of(found["result"]):
                raise ValueError("its content is not what was written")
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            reason = type(error).__name__
            raise UserError(f"{file}: is damaged ({reason}); delete it and make share {shard} again") from None
        if different := [name for name, value in self.made_of.items() if there.get(name) != value]:
            raise UserError(
                f"{file}: was made with other {different[0]}; make all shares alike, or delete {self.folder}"
            )
        return result


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
