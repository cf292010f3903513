"""Reading every byte of a run, checkpoint, store or folder of samples, to find damaged and missing files.

Journals and reports are left out: no stage reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.errors import Damaged, UserError
from dalle_cli.progress import progress
from dalle_cli.stores.checkpoint import open_checkpoint, step_folders
from dalle_cli.stores.checksums import CHECKSUMS, require_undamaged
from dalle_cli.stores.png import END, SIGNATURE, png_damage
from dalle_cli.stores.samples import read_attributes
from dalle_cli.stores.scores import CLIP_SCORE, sample_stores, store_lines
from dalle_cli.stores.tokens import TokenReader, being_written
from dalle_cli.stores.typed import explain_damage
from dalle_cli.stores.zarr_files import chunk_file

Check = tuple[str, Callable[[], object]]
"""The name of what is checked, and a function that raises UserError if it is damaged."""


@dataclass
class Verified:
    """The names of all that was read, and a message for each file that is missing or not what was written."""

    checked: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """Note that ``name`` is checked, and the damage that the block finds."""
        self.checked.append(name)
        try:
            yield
        except UserError as error:
            self.damage.append(str(error))


def verify(path: Path) -> Verified:
    """Read all of a run, a checkpoint, a token store or a folder of samples.

    Raises:
        UserError: there is nothing of the kind at ``path``.
    """
    artifacts = list(_artifacts(path))
    if not artifacts:
        raise UserError(f"{path}: is no run, checkpoint, token store or folder of samples; name one of these")
    found, files = Verified(), list[Check]()
    for name, check, parts in artifacts:
        with found.noting(name):
            check()
            files += parts()
    with progress("verify", len(files), "files") as bar:
        for name, check in files:
            with found.noting(name):
                check()
            bar.advance()
    return found


Artifact = tuple[str, Callable[[], object], Callable[[], list[Check]]]
"""The name of an artifact, the check of its metadata, and the function that lists the checks of its files."""


def _artifacts(path: Path) -> Iterator[Artifact]:
    places = RunFolders(path)
    if places.begun:
        if places.tokenizer.is_dir():
            yield _tokenizer(places.tokenizer)
        if places.tokens.is_dir():
            yield _token_store(places.tokens)
        for stage in (places.dvae, places.prior, places.clip):
            yield from map(_checkpoint, step_folders(stage) if stage.is_dir() else [])
        folders = sorted(places.samples.iterdir()) if places.samples.is_dir() else []
        yield from (_samples(folder) for folder in folders if folder.is_dir() and not folder.name.startswith("."))
    elif (path / "manifest.json").is_file():
        yield _checkpoint(path)
    elif stores := sample_stores(path):
        yield from (_samples(store.parent) for store in stores)
    elif (path / "zarr.json").is_file():
        yield _token_store(path)
    elif (path / "tokenizer.json").is_file():
        yield _tokenizer(path)
    elif path.is_dir():
        yield from map(_checkpoint, step_folders(path))


def _tokenizer(folder: Path) -> Artifact:
    return str(folder), partial(require_undamaged, folder), list


def _checkpoint(folder: Path) -> Artifact:
    def check() -> None:
        if not (folder / "manifest.json").is_file():
            raise Damaged(f"{folder}: has no manifest.json, so it is damaged or half deleted; restore or delete it")
        open_checkpoint(folder).check(0, 1)

    return str(folder), check, list


def _token_store(store: Path) -> Artifact:
    def metadata() -> None:
        if not being_written(store):
            require_undamaged(store)

    def shards() -> list[Check]:
        found: list[Check] = []
        with explain_damage(store):
            found += ((str(file), read) for file, read in TokenReader(store).shards())
        return found

    return str(store), metadata, shards


def _samples(folder: Path) -> Artifact:
    stores, begun = sample_stores(folder), list[Path]()

    def metadata() -> None:
        if not stores:
            raise Damaged(f"{folder}: its samples.zarr is missing or damaged; draw the samples again")
        begun.extend(store for store in stores if _check_arrays(store))

    def pictures() -> list[Check]:
        pngs = [line["png"] for store in begun for line in store_lines(store)]
        return [(png, partial(_check_png, Path(png))) for png in pngs]

    return str(folder), metadata, pictures


def _check_arrays(store: Path) -> int:
    """Read the arrays of a sample store, and return its number of rows.

    Raises:
        UserError: a file is damaged or missing; zarr would take a missing one for zeros.
    """
    import zarr

    rows = 0
    if (store / CLIP_SCORE).is_dir():
        require_undamaged(store / CLIP_SCORE)
    with explain_damage(store):
        group: Any = zarr.open_group(str(store), mode="r", zarr_format=3)
        rows, total = int(group.attrs["rows"]), int(group["tokens"].shape[0])
        if rows == total or (store.parent / CHECKSUMS).is_file():  # which is written with the last sample
            require_undamaged(store.parent)
        read_attributes(group, store)
        for name in ("tokens", "log_likelihood", CLIP_SCORE):
            if name == CLIP_SCORE and not (store / name).is_dir():
                continue
            array = group[name]
            size = array.chunks[0]
            for start in range(0, rows, size):
                file = chunk_file(store / name, array, start)
                if not file.is_file() or not file.stat().st_size:
                    raise Damaged(f"{file}: is missing or empty; draw the samples again")
                array[start : start + size]
    return rows


def _check_png(file: Path) -> None:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror}); draw it again") from None
    whole = data.startswith(SIGNATURE) and data.endswith(END)
    if (damage := png_damage(data) if whole else "not a whole PNG file") is not None:
        raise Damaged(f"{file}: is damaged: {damage}; delete it and draw it again")
