"""Opening of the source of captioned pictures that the user names, whatever its format."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dalle_cli.data.download import CACHE, NoRoom, local_copies
from dalle_cli.data.formats.folder import FolderSource
from dalle_cli.data.formats.manifest import ManifestSource
from dalle_cli.data.formats.published import (
    COCO_CAPTIONS,
    FLICKR_CAPTIONS,
    FLICKR_FOLDERS,
    open_coco,
    open_cub,
    open_flickr,
)
from dalle_cli.data.formats.tables import JsonLinesTable, Table, open_delimited
from dalle_cli.data.formats.tar_members import LocalFile, TarFile
from dalle_cli.data.formats.web_tables import open_wit, open_yfcc
from dalle_cli.data.formats.webdataset import WebDatasetSource
from dalle_cli.data.joined import JoinedSource
from dalle_cli.data.remote import RemoteFile, files_at, is_remote
from dalle_cli.data.source import IMAGE_EXTENSIONS, BadSample, Source
from dalle_cli.errors import UserError
from dalle_cli.progress import log

MANIFEST_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_SHARDS = 1_000_000


class Format(NamedTuple):
    """A format of sources, described for error messages; ``open`` returns None if a source has another format."""

    description: str
    open: Callable[[str, Path], Source | None]


def open_sources(specs: Sequence[str]) -> Source:
    """Open one source, or several as one; see ``open_source``."""
    return open_source(specs[0]) if len(specs) == 1 else JoinedSource([open_source(spec) for spec in specs])


def open_source(spec: str | Path) -> Source:
    """Open the source at ``spec``, a path, an address or a pattern of shards, by the first of FORMATS that fits.

    Raises:
        UserError: there is nothing at ``spec``, or nothing that can be used.
    """
    path, name = Path(spec), str(spec)
    if is_remote(name):
        return _open_remote(name)
    try:
        for kind in FORMATS:
            if (source := kind.open(name, path)) is not None:
                return source
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read: {error.strerror}") from None
    except BadSample as error:  # the manifest itself, not a picture in it
        raise UserError(f"{name}: {error}") from None
    if not path.exists():
        where = "" if path.is_absolute() else f"; paths are relative to the folder where dalle runs, now {Path.cwd()}"
        raise UserError(f"{name}: no such file or folder{where}")
    raise UserError(f"{name}: not a known kind of source (looked for {_known()})")


def _open_remote(name: str) -> Source:
    """Open shards, or Parquet with pictures, at an address, a pattern of addresses, or a folder at an address."""
    if shards := _remote_shards(name):
        return WebDatasetSource(name, shards)
    folder, wanted = name, None
    if not (tables := files_at(name, (".parquet",))) and "/" not in name.rpartition(":")[2]:
        folder, _, wanted = name.rpartition(":")
        tables = files_at(folder, (".parquet",))
    if tables:
        from dalle_cli.data.formats.embedded import choose_split, open_embedded  # pyarrow is slow to import

        _, chosen = choose_split(name, [table.path for table in tables], wanted)
        source = open_embedded(name, local_copies([tables[i] for i in chosen]), wanted)
        if source is not None:
            return source
    raise UserError(
        f"{name}: holds neither .tar shards nor Parquet with pictures in it, which are the formats that are read from "
        "an address; download it first"
    )


def tar_shards(spec: str) -> list[TarFile]:
    """Return the tar shards of a source, at a path, an address or a pattern.

    Raises:
        UserError: there are none.
    """
    shards = _remote_shards(spec) if is_remote(spec) else _local_shards(spec, Path(spec))
    if not shards and not is_remote(spec) and not Path(spec).exists():
        raise UserError(f"{spec}: no such file or folder")
    if not shards:
        raise UserError(f"{spec}: holds no .tar shards; sources of other formats need no index")
    return shards


def _remote_shards(name: str) -> list[TarFile]:
    pattern = _BRACES.search(name) is not None
    shards = [RemoteFile(url) for url in expand_braces(name)] if pattern else files_at(name, (".tar",))
    if shards and os.environ.get(CACHE):
        try:
            return [LocalFile(copy, shard) for copy, shard in zip(local_copies(shards), shards, strict=True)]
        except NoRoom as error:
            log(f"{name}: is read by ranges of bytes, since {error}")
    return list(shards)


def _open_webdataset(name: str, path: Path) -> Source | None:
    shards = _local_shards(name, path)
    return None if shards is None else WebDatasetSource(name, shards)


def _local_shards(name: str, path: Path) -> list[TarFile] | None:
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        shards = [entry for entry in entries if entry.suffix.lower() == ".tar" and entry.is_file()]
        images = [entry for entry in entries if entry.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS]
        if shards and images:
            raise UserError(
                f"{name}: holds both shards ({shards[0].name}) and images ({images[0].name}): separate them"
            )
        if not shards and (packed := [entry.name for entry in entries if _is_compressed_tar(entry)]):
            raise UserError(f"{name}: its shards are compressed ({packed[0]}); unpack them to .tar first")
        if not shards:
            below = [entry.name for entry in entries if entry.is_dir() and any(entry.glob("*.tar"))]
            if below:
                raise UserError(f"{name}: its .tar shards are in folders below it; name one of {', '.join(below)}")
            return None
        return [LocalFile(shard) for shard in shards]
    if path.is_file():
        if _is_compressed_tar(path):
            raise UserError(f"{name}: is compressed; unpack it to a .tar first")
        return [LocalFile(path)] if path.suffix.lower() == ".tar" else None
    if not _BRACES.search(name):
        return None
    return [LocalFile(shard) for shard in _shards_of_pattern(name)]


def _is_compressed_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tgz", *(f".tar{ending}" for ending in _COMPRESSED)))


def _open_coco(name: str, path: Path) -> Source | None:
    if path.is_file():
        return open_coco(name, path) if path.suffix.lower() == ".json" else None
    files = (path / "annotations").glob(COCO_CAPTIONS) if path.is_dir() else []
    found = sorted(file for file in files if file.is_file())
    if len(found) > 1:
        raise UserError(f"{name}: holds {len(found)} sets of captions: name one of {', '.join(map(str, found))}")
    return open_coco(name, found[0]) if found else None


def _open_flickr(name: str, path: Path) -> Source | None:
    if path.is_file():
        return open_flickr(name, path)
    for file in (path / folder / captions for folder in FLICKR_FOLDERS for captions in FLICKR_CAPTIONS):
        if file.is_file() and (source := open_flickr(name, file)) is not None:
            return source
    return None


def _open_embedded(name: str, path: Path) -> Source | None:
    folder, wanted = path, None
    if not path.exists() and ":" in name:
        start, _, wanted = name.rpartition(":")
        folder = Path(start)
    places = [folder, folder / "data"] if folder.is_dir() else []
    found = (sorted(filter(Path.is_file, place.glob("*.parquet"))) for place in places)
    files = next((files for files in found if files), [])
    if folder.is_file() and folder.suffix.lower() == ".parquet":
        files = [folder]
    if not files:
        return None
    from dalle_cli.data.formats.embedded import open_embedded  # pyarrow is slow to import

    return open_embedded(name, files, wanted)


def _open_manifest(name: str, path: Path) -> Source | None:
    if path.is_dir():
        return _open_only(name, _metadata_in(path))
    ending = path.suffix.lower()
    if path.is_file() and path.name.lower().endswith(tuple(f"{e}{c}" for e in MANIFEST_ENDINGS for c in _COMPRESSED)):
        raise UserError(f"{name}: is compressed; unpack it first")
    if ending not in MANIFEST_ENDINGS or not path.is_file():
        return None
    return ManifestSource(name, f"{ending[1:]} manifest", _table(path, ending), path.parent)


def _open_only(name: str, manifests: list[Path]) -> Source | None:
    """Open the only manifest of a folder; return None if there is none, raise UserError if there are several."""
    if len(manifests) > 1:
        raise UserError(f"{name}: holds {len(manifests)} manifests: name one of {', '.join(map(str, manifests))}")
    return _open_manifest(name, manifests[0]) if manifests else None


def _metadata_in(folder: Path) -> list[Path]:
    files = (folder / f"metadata{ending}" for ending in MANIFEST_ENDINGS)
    return [file for file in files if file.is_file()]


def is_manifest(path: Path) -> bool:
    """Return whether the file is a manifest that names columns of pictures and captions."""
    if not path.is_file():  # a pipe would block
        return False
    try:
        _table(path, path.suffix.lower())
    except (UserError, OSError, BadSample):
        return False
    return True


def _table(path: Path, ending: str) -> Table:
    if ending == ".parquet":
        from dalle_cli.data.formats.parquet import ParquetTable  # pyarrow is slow to import

        return ParquetTable(path)
    return JsonLinesTable(path) if ending in (".jsonl", ".ndjson") else open_delimited(path)


def _open_folder(name: str, path: Path) -> Source | None:
    if not path.is_dir():
        return None
    try:
        source = FolderSource(path)
    except UserError as error:
        raise UserError(f"{error}; it is not a known kind of source (looked for {_known()})") from None
    if source.captioned:
        return source
    below = [metadata for each in sorted(path.iterdir()) if each.is_dir() for metadata in _metadata_in(each)]
    train = [metadata for metadata in below if metadata.parent.name == "train"]  # the Hub's folders, one for each split
    beside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in MANIFEST_ENDINGS and is_manifest(file)]
    return _open_only(name, beside or train or below) or source


FORMATS = (
    Format("COCO's annotations/captions_*.json beside its folder of pictures, or the folder above", _open_coco),
    Format("CUB-200-2011: a folder with images.txt, images and text_c10 or text", open_cub),
    Format(f"Flickr8k's or Flickr30k's {', '.join(FLICKR_CAPTIONS)} beside its pictures", _open_flickr),
    Format("YFCC100M's yfcc100m_dataset beside its images", open_yfcc),
    Format("WIT's wit_v1.*.tsv beside its images", open_wit),
    Format("a .tar of WebDataset, a folder of them, or train-{00000..00099}.tar", _open_webdataset),
    Format("Parquet with the pictures in it: a file, a folder such as the Hub's, or FOLDER:SPLIT", _open_embedded),
    Format(f"a manifest: {', '.join(MANIFEST_ENDINGS)}, or a folder with metadata.csv ...", _open_manifest),
    Format("a folder of images, at any depth, with .txt captions beside them", _open_folder),
)
"""All formats, in the order in which they are tried."""


def _known() -> str:
    return "; ".join(kind.description for kind in FORMATS)


def _shards_of_pattern(pattern: str) -> list[Path]:
    shards = [Path(name) for name in expand_braces(pattern)]
    if len(set(shards)) < len(shards):
        raise UserError(f"{pattern}: names a shard twice")
    if wrong := [shard for shard in shards if shard.suffix.lower() != ".tar"]:
        raise UserError(f"{pattern}: {wrong[0]} is not a .tar shard")
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise UserError(f"{pattern}: {len(missing)} of {len(shards)} shards missing: {missing[0]} ...")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as a shell does: "a-{00..02}.{x,y}" gives a-00.x, a-00.y, a-01.x, ...

    Raises:
        UserError: a range is malformed, or there are too many names.
    """
    pieces = _BRACES.split(pattern)  # plain text and the insides of braces alternate
    choices = [_alternatives(piece, pattern) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_SHARDS:
        raise UserError(f"{pattern}: stands for {count} shards, more than {_MAX_SHARDS}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    """Return the strings that the braces around ``inside`` stand for."""
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    digits = re.compile("[0-9]{1,18}")
    if not (digits.fullmatch(first) and digits.fullmatch(last)) or int(first) > int(last):
        raise UserError(f"{pattern}: {{{inside}}} is not a range such as {{00000..00099}}")
    if int(last) - int(first) >= _MAX_SHARDS:
        raise UserError(f"{pattern}: {{{inside}}} stands for more than {_MAX_SHARDS} shards")
    width = len(first) if first.startswith("0") else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
