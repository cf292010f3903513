"""Reading every byte of a run, checkpoint or token store, to find damaged and missing files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.stores.checkpoint import open_checkpoint, steps_in
from dalle_cli.stores.tokens import TokenReader


@dataclass
class Verified:
    """The names of all that was read, and a message for each file that is missing or not what was written."""

    checked: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def verify(path: Path) -> Verified:
    """Read all of a checkpoint, of the checkpoints and the token store in a run's folder, or of a token store.

    Raises:
        UserError: there is nothing of the kind at ``path``.
    """
    found, parts = Verified(), list(_parts(path))
    if not parts:
        raise UserError(f"{path}: is no run, checkpoint or token store; name one of these")
    with progress("verify", len(parts), "files") as bar:
        for name, check in parts:
            try:
                check()
            except UserError as error:
                found.damage.append(str(error))
            found.checked.append(name)
            bar.advance()
    return found


def _parts(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the check of each shard of a store and of each checkpoint."""
    if (path / "zarr.json").is_file():
        yield from _shards(path)
    elif (path / "manifest.json").is_file():
        yield str(path), partial(_check, path)
    elif path.is_dir():
        places = RunFolders(path)
        for step in steps_in(path):
            yield str(step), partial(_check, step)
        for stage in (places.dvae, places.prior, places.clip):
            if stage.is_dir():
                yield from _parts(stage)
        if (places.tokens / "zarr.json").is_file():
            yield from _shards(places.tokens)


def _check(checkpoint: Path) -> None:
    open_checkpoint(checkpoint).check(0, 1)


def _shards(store: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    reader = TokenReader(store)
    for file, read in reader.shards():
        yield str(file), read
