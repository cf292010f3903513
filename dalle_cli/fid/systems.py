"""Systems to measure: the pictures of each, with captions and scores if known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dalle_cli.data.captions import normal_id
from dalle_cli.data.open_source import is_manifest
from dalle_cli.data.sample_lines import read_sample_lines
from dalle_cli.data.sample_table import SampleTable
from dalle_cli.data.source import BadSample, read_caption_file
from dalle_cli.errors import UserError
from dalle_cli.fid.pictures import FilePictures, Pictures, PictureSubset, SourcePictures, open_pictures
from dalle_cli.randomness import numpy_generator
from dalle_cli.shapes.accuracy import Pool
from dalle_cli.stores.scores import sample_stores, store_lines

MAX_SOURCE_CAPTIONS = 50_000
"""Largest source whose captions are read; they are only needed to show its pictures beside generated ones."""
Origin = Literal["lines", "named files", "pictures"]
"""Origin of the pictures: lines of samples, files named by captions' ids, or any pictures, such as real ones."""


@dataclass(frozen=True)
class System:
    """Pictures of one system; a caption's ranked samples are consecutive."""

    name: str
    spec: str
    """Path of the pictures, as given."""
    pictures: Pictures
    captions: list[str] | None
    """Caption of each picture (n,); None if unknown."""
    pools: list[Pool] = field(default_factory=list)
    """Ranked samples of each caption, in the order of ``pictures``; empty for pictures without scores."""
    origin: Origin = "pictures"

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Index of each picture's caption (n,); None if captions are unknown."""
        if self.pools:
            return np.repeat(np.arange(len(self.pools)), [len(pool.lines) for pool in self.pools])
        if self.captions is None:
            return None
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(self.captions))}
        return np.array([numbers[caption] for caption in self.captions], np.int64)


def open_system(
    name: str, spec: str, size: int, captions: Mapping[str, str] | None, limit: int | None, seed: int
) -> System:
    """Open the pictures of a system, to be cropped and resized to ``size``.

    ``spec`` is a .jsonl file of ``dalle sample`` or ``dalle rerank``, a sample store, a folder, or a captioned source.
    ``captions`` by id keep only their pictures: a folder's files are named by the ids, lines hold ids or prompts.
    ``limit`` keeps a random choice of that many captions, or of pictures if captions are unknown.

    Raises:
        UserError: ``spec`` is none of these, or a caption has no picture.
    """
    path = Path(spec)
    if path.suffix == ".jsonl" and path.is_file() and not is_manifest(path):
        with path.open(encoding="utf-8") as stream:
            table = SampleTable(read_sample_lines(stream, spec))
    elif stores := sample_stores(path):
        table = SampleTable(line for store in stores for line in store_lines(store))
    else:
        found = _folder(name, spec, size, captions)
        return _limited(found, limit, seed)
    if not len(table):
        raise UserError(f"system {name}: {spec} holds no sample; look at what dalle sample said on stderr")
    if captions is None:
        groups = list(table.grouped("prompt", str).items())
    else:  # Different ids may share a caption, so each id is ranked separately.
        groups = _rows_of_captions(name, spec, table, captions)
    ranked = []
    if table.scored(np.concatenate([rows for _, rows in groups])):
        groups = [(caption, table.best_first(rows)) for caption, rows in groups]
        ranked = [Pool(caption, table.lines(rows, caption)) for caption, rows in groups]
    prompts = [prompt for caption, rows in groups for prompt in [caption.strip()] * len(rows)]
    rows = np.concatenate([rows for _, rows in groups])
    if captions is None and not ranked:
        order = np.argsort(rows)  # the order of the lines
        rows, prompts = rows[order], [prompts[place] for place in order]
    pictures = FilePictures(table.paths(rows), size)
    return _limited(System(name, spec, pictures, prompts, ranked, "lines"), limit, seed)


def _rows_of_captions(
    name: str, spec: str, table: SampleTable, captions: Mapping[str, str]
) -> list[tuple[str, NDArray[np.int64]]]:
    """Return each of the captions, in their order, with the rows of its samples."""
    by_id = table.grouped("id", lambda value: normal_id(str(value).strip()))
    by_prompt = table.grouped("prompt", str.strip)
    groups = []
    missing = []
    for identity, caption in captions.items():
        rows = by_id.get(identity, by_prompt.get(caption))
        if rows is not None:
            groups.append((caption, rows))
        else:
            missing.append(f"{identity} ({caption!r})")
    _check_all_drawn(name, spec, missing, len(captions))
    return groups


def _check_all_drawn(name: str, spec: str, missing: Sequence[str], wanted: int) -> None:
    if missing:
        raise UserError(
            f"system {name}: {spec} has no picture of {len(missing)} of the {wanted} captions, the first of them "
            f"{missing[0]}; draw them, or name the captions that it has with --captions"
        )


def _folder(name: str, spec: str, size: int, captions: Mapping[str, str] | None) -> System:
    try:
        pictures = open_pictures(spec, size)
    except UserError as error:
        raise UserError(f"system {name}: {error}") from None
    if not isinstance(pictures, FilePictures):
        if captions is not None:
            raise UserError(f"system {name}: {spec} is no folder of pictures named by the captions' ids")
        return System(name, spec, pictures, captions_of_source(pictures))
    if captions is None:
        known, origin = captions_beside(pictures.paths)
        return System(name, spec, pictures, known, origin=origin)
    by_id: dict[str, Path] = {}
    for path in pictures.paths:
        identity = normal_id(path.stem)
        if identity in by_id:
            raise UserError(f"system {name}: {by_id[identity]} and {path} are both of caption {identity}; keep one")
        by_id[identity] = path
    missing = [f"{identity} ({caption!r})" for identity, caption in captions.items() if identity not in by_id]
    _check_all_drawn(name, spec, missing, len(captions))
    files = FilePictures([by_id[identity] for identity in captions], size)
    return System(name, spec, files, list(captions.values()), origin="named files")


def captions_beside(paths: Sequence[Path]) -> tuple[list[str] | None, Origin]:
    """Return the first caption of the .txt file beside each picture, or else the file names as captions.

    Systems with the same captions often have the same file names. Names are used only if all files are in one folder
    and the names differ; otherwise the captions are None.
    """
    try:
        return [read_caption_file(path.with_suffix(".txt"))[0] for path in paths], "pictures"
    except BadSample:
        names = [normal_id(path.stem) for path in paths]
    if len({path.parent for path in paths}) == 1 and len(set(names)) == len(names):
        return names, "named files"
    return None, "pictures"


def captions_of_source(pictures: Pictures) -> list[str] | None:
    """Return the first caption of each picture of a source; None if one has none, or there are too many."""
    if not isinstance(pictures, SourcePictures) or len(pictures) > MAX_SOURCE_CAPTIONS:
        return None
    try:
        return [pictures.source.captions(row)[0] for row in range(len(pictures))]
    except BadSample:
        return None


def _limited(system: System, limit: int | None, seed: int) -> System:
    groups = system.groups
    groups = np.arange(len(system.pictures)) if groups is None else groups
    count = int(groups.max()) + 1 if len(groups) else 0
    if limit is None or limit >= count:
        return system
    chosen = np.sort(numpy_generator(seed, "eval-fid", "limit").permutation(count)[:limit])
    rows = np.flatnonzero(np.isin(groups, chosen))
    captions = None if system.captions is None else [system.captions[row] for row in rows]
    ranked = [system.pools[number] for number in chosen] if system.pools else []
    return System(system.name, system.spec, PictureSubset(system.pictures, rows), captions, ranked, system.origin)


def check_same_captions(systems: Sequence[System]) -> list[str]:
    """Return warnings about systems with different captions, whose metrics are not fully comparable.

    Raises:
        UserError: two systems have no caption in common.
    """
    warnings = []
    known = [(s, set(s.captions)) for s in systems if s.captions is not None and s.origin != "pictures"]
    for one, first in known[:1]:
        for other, second in known[1:]:
            if not first & second and one.origin == other.origin == "lines":
                raise UserError(
                    f"systems {one.name} and {other.name} have no caption in common: {one.spec} begins with "
                    f"{(one.captions or [])[0]!r}, {other.spec} with {(other.captions or [])[0]!r}"
                )
            only = [f"{len(extra)} only of {system.name} (such as {min(extra)!r})"
                    for system, extra in ((one, first - second), (other, second - first)) if extra]  # fmt: skip
            if only:
                warnings.append(
                    f"{one.name} and {other.name} were not given the same captions: {len(first & second)} in common, "
                    f"{', '.join(only)}; measure the same captions of all with --captions FILE"
                )
    return warnings


def per_caption(system: System) -> dict[str, int]:
    """Return the row of one picture per caption: the best if there are scores, else the first."""
    rows: dict[str, int] = {}
    for row, caption in enumerate(system.captions or []):
        rows.setdefault(caption, row)
    return rows
