"""Named tensors on disk: in one safetensors file, or slab by slab in several, with an index.

The files are ``NAME.safetensors`` alone, or ``NAME-00001-of-00008.safetensors`` and so on beside ``NAME.index.json``,
which holds the shape of each tensor and the slab of it in each file. Each rank writes one file; a reader reads the slab
that it needs, however many ranks wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from dalle_cli.errors import Damaged, UserError
from dalle_cli.stores.typed import Count, read_typed

if TYPE_CHECKING:
    import torch


class Slab(NamedTuple):
    """Consecutive indices of a tensor along one axis, such as rows, up to ``stop`` or the end; by default all of it."""

    first: int = 0
    stop: int | None = None
    axis: int = 0

    def of(self, tensor: Any) -> Any:
        """Return these indices of a tensor, or of safetensors' slice of one; a scalar has no indices."""
        return tensor[(*[slice(None)] * self.axis, slice(self.first, self.stop))]


WHOLE = Slab()


class Part(NamedTuple):
    """Consecutive indices along ``axis``, from ``first`` on, of a tensor of ``shape``; a scalar is stored whole."""

    value: torch.Tensor
    first: int = 0
    shape: tuple[int, ...] = ()
    axis: int = 0

    @property
    def stop(self) -> int:
        return self.first + self.value.shape[self.axis] if self.shape else 0


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
        if (found := re.search(r"(?:os error|code:) ([0-9]{1,4})", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(file)) from error


def require_like(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise Damaged unless the tensors that were read ``where`` have the names, shapes and kinds of numbers wanted."""
    for name in wanted:
        if name not in found:
            raise Damaged(f"{where}: is damaged: lacks {name}; restore it or use an older checkpoint")
    for name, tensor in found.items():
        if name not in wanted:
            raise Damaged(f"{where}: is damaged: holds {name}, which is no weight of it; use an older checkpoint")
        is_like = tensor.shape == wanted[name].shape, tensor.is_floating_point() == wanted[name].is_floating_point()
        if not all(is_like):
            raise Damaged(
                f"{where}: is damaged: {name} is {tensor.dtype} {tuple(tensor.shape)} in place of {wanted[name].dtype} "
                f"{tuple(wanted[name].shape)}; restore it or use an older checkpoint"
            )


def part_file(name: str, index: int, count: int) -> str:
    """Return the name of the ``index``-th (from 0) of ``count`` files that hold the tensors of ``name``."""
    return f"{name}-{index + 1:05d}-of-{count:05d}.safetensors"


def index_entries(file: str, parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """Return the index entries of the parts in a file."""
    return {
        name: {
            "shape": list(part.shape),
            "parts": [[file, part.first, part.stop]],
            **({"axis": part.axis} if part.axis else {}),
        }
        for name, part in parts.items()
    }


def join_entries(entries: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the index of several files, given the ``index_entries`` of each.

    Raises:
        ValueError: a part of a tensor is missing, or in two files.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for own in entries:
        for name, entry in own.items():
            known = tensors.setdefault(name, {**entry, "parts": []})
            known["parts"] += entry["parts"]
    for name, entry in tensors.items():
        if not entry["shape"]:
            entry["parts"] = entry["parts"][:1]  # every file holds the same scalar
        entry["parts"].sort(key=lambda part: part[1])
        ends = [0, *(stop for _, _, stop in entry["parts"])]
        starts = [start for _, start, _ in entry["parts"]]
        if starts != ends[:-1] or ends[-1] != (entry["shape"] or [0])[entry.get("axis", 0)]:
            raise ValueError(f"parts of {name} do not make up its shape {entry['shape']}: {entry['parts']}")
    return {"format": "dalle-tensor-parts", "tensors": tensors}


@dataclass(frozen=True)
class _Entry:
    """The place of a tensor: its shape, and the indices along ``axis`` in each file."""

    shape: tuple[Count, ...]
    parts: Annotated[list[tuple[str, Count, Count]], Field(min_length=1)]
    axis: Annotated[int, Field(ge=0, le=1)] = 0


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
        one = self.read(name, Slab(0, 1))
        if not one.dim():
            return one.nbytes
        rows = _shape(self.whole, name)[0] if self._index is None else self._index[name].shape[0]
        return int(one.nbytes * rows)

    def read(self, name: str, slab: Slab = WHOLE) -> torch.Tensor:
        """Return a slab of a tensor, on the CPU; a scalar is read whole."""
        import torch

        if self._index is None:
            return _read(self.whole, name, slab)
        entry = self._index[name]
        if not entry.shape:
            return _read(self.folder / entry.parts[0][0], name, slab)
        if slab.axis != entry.axis:
            pieces = [_read(self.folder / file, name, slab) for file, _, _ in entry.parts]
            return torch.cat(pieces, entry.axis)
        first, stop, _ = slice(slab.first, slab.stop).indices(entry.shape[slab.axis])
        pieces = []
        for file, start, end in entry.parts:
            begin, finish = max(first, start) - start, min(stop, end) - start
            if begin < finish:
                pieces.append(_read(self.folder / file, name, Slab(begin, finish, slab.axis)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, slab.axis)

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


def _read(path: Path, name: str, slab: Slab) -> torch.Tensor:
    with _opened(path) as file:
        found = file.get_slice(name)
        if not found.get_shape() or slab == WHOLE:
            return file.get_tensor(name)  # type: ignore[no-any-return]
        return slab.of(found)  # type: ignore[no-any-return]


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
