"""Named tensors on disk: in one safetensors file, or row by row in several, with an index.

The files are ``NAME.safetensors`` alone, or ``NAME-00001-of-00008.safetensors`` and so on beside ``NAME.index.json``,
which holds the shape of each tensor and the rows of it in each file. Each rank writes one file; a reader reads the rows
it needs, however many ranks wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from dalle_cli.errors import UserError
from dalle_cli.stores.typed import Count, read_typed

if TYPE_CHECKING:
    import torch


class Part(NamedTuple):
    """Consecutive rows, from ``first`` on, of a tensor of ``shape``; a scalar has no rows and is stored whole."""

    value: torch.Tensor
    first: int = 0
    shape: tuple[int, ...] = ()


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full.
    """
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, file)
    except OSError:
        raise
    except Exception as error:  # safetensors reports a failed write as its own error, with the number inside
        if "space" in str(error).lower() or "os error 28" in str(error).lower():
            raise OSError(28, str(error)) from error
        raise


def part_file(name: str, index: int, count: int) -> str:
    """Return the name of the ``index``-th (from 0) of ``count`` files that hold the tensors of ``name``."""
    return f"{name}-{index + 1:05d}-of-{count:05d}.safetensors"


def index_entries(file: str, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """Return the index entries of the parts in a file."""
    return {
        name: {"shape": list(part.shape), "parts": [[file, part.first, part.first + rows_of(part)]]}
        for name, part in parts.items()
    }


def rows_of(part: Part) -> int:
    """Return the number of rows of a part, 0 for a scalar."""
    return len(part.value) if part.value.dim() else 0


def join_entries(entries: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the index of several files, given the ``index_entries`` of each.

    Raises:
        ValueError: a row is missing, or in two files.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for own in entries:
        for name, entry in own.items():
            known = tensors.setdefault(name, {"shape": entry["shape"], "parts": []})
            known["parts"] += entry["parts"]
    for name, entry in tensors.items():
        if not entry["shape"]:
            entry["parts"] = entry["parts"][:1]  # every file holds the same scalar
        entry["parts"].sort(key=lambda part: part[1])
        ends = [0, *(stop for _, _, stop in entry["parts"])]
        starts = [start for _, start, _ in entry["parts"]]
        if starts != ends[:-1] or ends[-1] != (entry["shape"] or [0])[0]:
            raise ValueError(f"parts of {name} do not make up its shape {entry['shape']}: {entry['parts']}")
    return {"format": "dalle-tensor-parts", "tensors": tensors}


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor: its shape, and the rows of it in each file."""

    shape: tuple[Count, ...]
    parts: Annotated[list[tuple[str, Count, Count]], Field(min_length=1)]


@dataclass(frozen=True)
class _Index:
    tensors: dict[str, _Entry]


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of ``name`` in ``folder``. Every method raises UserError if a file is missing or damaged."""

    folder: Path
    name: str

    @property
    def whole(self) -> Path:
        """File that holds all tensors, if there is only one."""
        return self.folder / f"{self.name}.safetensors"

    def names(self) -> list[str]:
        if self._index is not None:
            return list(self._index)
        with _opened(self.whole) as file:
            return list(file.keys())

    def files(self) -> list[Path]:
        if self._index is None:
            return [self.whole]
        found = {part[0] for entry in self._index.values() for part in entry.parts}
        return [self.folder / file for file in sorted(found)]

    def nbytes(self, name: str) -> int:
        one = self.read(name, slice(0, 1))
        if not one.dim():
            return one.nbytes
        rows = _shape(self.whole, name)[0] if self._index is None else self._index[name].shape[0]
        return int(one.nbytes * rows)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Return rows of a tensor, on the CPU; a scalar is read whole."""
        import torch

        if self._index is None:
            return _read(self.whole, name, rows)
        entry = self._index[name]
        if not entry.shape:
            return _read(self.folder / entry.parts[0][0], name, rows)
        first, stop, _ = rows.indices(entry.shape[0])
        pieces = []
        for file, start, end in entry.parts:
            wanted = slice(max(first, start) - start, min(stop, end) - start)
            if wanted.start < wanted.stop:
                pieces.append(_read(self.folder / file, name, wanted))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def all(self) -> dict[str, torch.Tensor]:
        if self._index is not None:
            return {name: self.read(name) for name in self.names()}
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        with _explained(self.whole, SafetensorError):
            return load_file(self.whole)

    @cached_property
    def _index(self) -> dict[str, _Entry] | None:
        file = self.folder / f"{self.name}.index.json"
        return read_typed(_Index, file).tensors if file.is_file() else None


def _shape(path: Path, name: str) -> list[int]:
    with _opened(path) as file:
        return list(file.get_slice(name).get_shape())


def _read(path: Path, name: str, rows: slice) -> torch.Tensor:
    with _opened(path) as file:
        found = file.get_slice(name)
        if not found.get_shape() or rows == slice(None):
            return file.get_tensor(name)  # type: ignore[no-any-return]
        return found[rows]  # type: ignore[no-any-return]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    with _explained(path, SafetensorError), safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def _explained(path: Path, damaged: type[Exception]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing from its checkpoint; restore it or train again") from None
    except damaged as error:
        raise UserError(f"{path}: damaged: {error}; restore it or use an older checkpoint") from None
