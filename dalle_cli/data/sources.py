"""Opens whatever the user names as a source of captioned images."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from dalle_cli.data.folder import FolderSource
from dalle_cli.data.samples import IMAGE_EXTENSIONS, BadSample, Source
from dalle_cli.data.webdataset import WebDatasetSource
from dalle_cli.errors import UserError

__all__ = ["BadSample", "Source", "expand_braces", "open_source"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_SHARDS = 1_000_000


def open_source(spec: str | Path) -> Source:
    """The source at `spec`; what it is follows from what is there:

    a .tar file, a pattern such as "train-{00000..00099}.tar", or a folder with .tar files directly in it are
    WebDataset shards; any other folder holds images, at any depth, with .txt captions beside them.

    Raises UserError if nothing is there, or nothing that can be used.
    """
    path, name = Path(spec), str(spec)
    if path.is_dir():
        return _open_folder(path, name)
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return WebDatasetSource(name, [path])
        raise UserError(f"{name}: not a known kind of source (a .tar shard, or a folder of shards or of images)")
    if _BRACES.search(name):
        return WebDatasetSource(name, _shards_of_pattern(name))
    raise UserError(f"{name}: no such file or folder (looked for a .tar shard, or a folder of shards or of images)")


def _open_folder(path: Path, name: str) -> Source:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    shards = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
    images = [entry for entry in entries if entry.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
    if shards and images:
        raise UserError(f"{name}: holds both shards ({shards[0].name}) and images ({images[0].name}): separate them")
    if shards:
        return WebDatasetSource(name, shards)
    below = [entry.name for entry in entries if entry.is_dir() and any(entry.glob("*.tar"))]
    if below:
        raise UserError(f"{name}: no .tar shards in it, but in its folders {', '.join(below)}: name one of them")
    return FolderSource(path)


def _shards_of_pattern(pattern: str) -> list[Path]:
    shards = [Path(name) for name in expand_braces(pattern)]
    if len(set(shards)) < len(shards):
        raise UserError(f"{pattern}: names a shard twice")
    if wrong := [shard for shard in shards if shard.suffix != ".tar"]:
        raise UserError(f"{pattern}: {wrong[0]} is not a .tar shard")
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise UserError(f"{pattern}: {len(missing)} of {len(shards)} shards missing: {missing[0]} ...")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """As a shell would: "a-{00..02}.{x,y}" is a-00.x, a-00.y, a-01.x, ... UserError for a bad range."""
    pieces = _BRACES.split(pattern)  # plain text and the insides of braces by turns
    choices = [_alternatives(piece, pattern) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST_SHARDS:
        raise UserError(f"{pattern}: stands for {count} shards, more than {_MOST_SHARDS}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (re.fullmatch("[0-9]+", first) and re.fullmatch("[0-9]+", last)) or int(first) > int(last):
        raise UserError(f"{pattern}: {{{inside}}} is not a range such as {{00000..00099}}")
    if int(last) - int(first) >= _MOST_SHARDS:
        raise UserError(f"{pattern}: {{{inside}}} stands for more than {_MOST_SHARDS} shards")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
