"""Reading every byte of a run, checkpoint, store or folder of samples, to find damaged and missing files.

Journals and reports are left out: no stage reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.stores.checkpoint import open_checkpoint, step_folders
from dalle_cli.stores.checksums import damage_in
from dalle_cli.stores.png import END, png_damage
from dalle_cli.stores.samples import CHUNK, STORE
from dalle_cli.stores.scores import CLIP_SCORE, sample_stores, store_lines
from dalle_cli.stores.tokens import TokenReader

Check = tuple[str, Callable[[], object]]
"""The name of what is checked, and a function that raises UserError if it is damaged."""


@dataclass
class Verified:
    """The names of all that was read, and a message for each file that is missing or not what was written."""

    checked: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)


def verify(path: Path) -> Verified:
    """Read all of a run, a checkpoint, a token store or a folder of samples.

    Raises:
        UserError: there is nothing of the kind at ``path``.
    """
    found, checks = Verified(), _checks(path)
    try:
        checks_made = list(checks)
    except UserError as error:
        found.damage.append(str(error))
        found.checked.append(str(path))
        return found
    if not checks_made:
        raise UserError(f"{path}: is no run, checkpoint, token store or folder of samples; name one of these")
    with progress("verify", len(checks_made), "files") as bar:
        for name, check in checks_made:
            try:
                check()
            except UserError as error:
                found.damage.append(str(error))
            found.checked.append(name)
            bar.advance()
    return found


def _checks(path: Path) -> Iterator[Check]:
    if (path / "manifest.json").is_file():
        yield str(path), partial(_check_checkpoint, path)
    elif sample_stores(path) and not (path / "samples").is_dir():
        yield from _sample_checks(path)
    elif (path / "zarr.json").is_file():
        yield from _token_checks(path)
    elif path.is_dir():
        places = RunFolders(path)
        for step in step_folders(path):
            yield str(step), partial(_check_checkpoint, step)
        if places.tokenizer.is_dir():
            yield str(places.tokenizer), partial(_check_folder, places.tokenizer)
        for stage in (places.dvae, places.prior, places.clip):
            if stage.is_dir():
                yield from _checks(stage)
        if places.tokens.is_dir():
            yield from _token_checks(places.tokens)
        if places.samples.is_dir():
            for folder in sorted(places.samples.iterdir()):
                if folder.is_dir() and not folder.name.startswith("."):
                    yield from _sample_checks(folder)


def _check_checkpoint(checkpoint: Path) -> None:
    open_checkpoint(checkpoint).check(0, 1)


def _check_folder(folder: Path) -> None:
    if (damage := damage_in(folder)) is not None:
        raise UserError(f"{damage}; copy it again, or make it again")


def _token_checks(store: Path) -> Iterator[Check]:
    reader = TokenReader(store)
    yield str(store), reader.require_whole_metadata
    for file, read in reader.shards():
        yield str(file), read


def _sample_checks(path: Path) -> Iterator[Check]:
    stores = sample_stores(path)
    if not stores:
        yield str(path), partial(_no_samples, path)
    for store in stores:
        yield str(store), partial(_check_sample_store, store)
        for line in store_lines(store):
            yield line["png"], partial(_check_png, Path(line["png"]))


def _no_samples(path: Path) -> None:
    raise UserError(f"{path / STORE}: is missing or damaged; draw the samples again")


def _check_sample_store(store: Path) -> None:
    import zarr

    rows = len(store_lines(store))
    group = zarr.open_group(str(store), mode="r", zarr_format=3)
    if rows == len(group["tokens"]):  # checksums are written with the last sample
        _check_folder(store.parent)
    for name, size in (("tokens", CHUNK), ("log_likelihood", CHUNK), (CLIP_SCORE, None)):
        if name not in group:
            continue
        array = group[name]
        size = min(size or array.shape[0], array.shape[0])
        for chunk in range(-(-rows // size)):
            file = store / name / "c" / "/".join(map(str, [chunk, *[0] * (array.ndim - 1)]))
            if not file.is_file():
                raise UserError(f"{file}: is missing; draw the samples again")
            try:
                array[chunk * size : (chunk + 1) * size]
            except Exception as error:  # zarr and its codecs raise errors of many kinds
                raise UserError(f"{file}: is damaged ({error}); draw the samples again") from None


def _check_png(file: Path) -> None:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); draw it again") from None
    is_png = data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(END)
    if (damage := png_damage(data) if is_png else "not a whole PNG file") is not None:
        raise UserError(f"{file}: is damaged: {damage}; draw it again")
