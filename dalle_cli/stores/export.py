"""Export of a checkpoint's EMA weights for sampling, in one file or in several of a maximum size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import Checkpoint, CheckpointFacts, open_checkpoint, write_manifest
from dalle_cli.stores.files import new_directory, owned, sha256_file, write_json
from dalle_cli.stores.tensor_files import (
    Part,
    TensorFiles,
    index_entries,
    join_entries,
    part_file,
    save_tensors,
)


def export_checkpoint(found: Checkpoint, out: Path, largest: int | None = None) -> Checkpoint:
    """Write the EMA weights of ``found``, without the trainer's state, as a checkpoint of the same identity.

    ``largest`` is the maximum number of bytes in a file, and in memory at once, unless a single tensor has more; None
    writes one file.

    Raises:
        UserError: ``out`` exists, another process is writing it, the disk is full, or the EMA weights are damaged.
    """
    with owned(out):
        return _export(found, out, largest)


def _export(found: Checkpoint, out: Path, largest: int | None) -> Checkpoint:
    if out.exists():
        raise UserError(f"{out}: exists already; choose another place, or delete it")
    source = found.checked_files_of("ema")
    groups = [source.names()] if largest is None else list(_groups(source, largest))
    hashes, entries = {}, []
    with new_directory(out) as folder:
        for i, names in enumerate(groups):
            whole = len(groups) == 1
            file = folder / (f"{source.name}.safetensors" if whole else part_file(source.name, i, len(groups)))
            tensors = {name: source.read(name) for name in names}
            save_tensors(tensors, file)
            hashes[file.name] = sha256_file(file)
            parts = {name: Part(value, 0, tuple(value.shape)) for name, value in tensors.items()}
            entries.append(index_entries(file.name, parts))
        others = {}
        if len(groups) > 1:
            index = f"{source.name}.index.json"
            write_json(folder / index, join_entries(entries))
            others[index] = sha256_file(folder / index)
        facts = CheckpointFacts(
            found.kind,
            found.step,
            found.recipe(),
            found.belongs,
            found.metrics,
            found.best,
            found.last_update,
            found.ended_early,
        )
        write_manifest(folder, facts, hashes, others, found.identity)
    return open_checkpoint(out, found.kind)


def _groups(source: TensorFiles, largest: float) -> Iterator[list[str]]:
    """Yield the tensors' names in order, in lists of at most ``largest`` bytes or of one name."""
    names: list[str] = []
    size = 0
    for name in source.names():
        own = source.nbytes(name)
        if names and size + own > largest:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names
