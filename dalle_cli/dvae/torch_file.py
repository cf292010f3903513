"""A reader of whole modules that ``torch.save`` wrote, in either of its layouts; it executes nothing.

Since 1.6 torch writes a zip archive: ``NAME/data.pkl`` and one uncompressed record ``NAME/data/KEY`` per storage. Older
versions wrote a stream: a magic number, a protocol version, the machine's byte order and sizes, the object and the keys
of its storages, each a pickle, then the storages in that order, each as its length (int64) and its values. Values are
little-endian in both.

``torch.load(weights_only=True)`` (torch 2.14) cannot replace this module. It refuses every module in the older layout,
where a class is a persistent id ("module", class, file, source), because it allows only storages as ids. In the zip
layout it hashes the keys and set elements of a pickle: a tuple nested 150,000 deep ends the process with a segmentation
fault, and one that holds the same tuple twice at each of a few dozen levels hangs it. It also unpacks compressed
records of any size.
"""

from __future__ import annotations

import io
import math
import mmap
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from dalle_cli.dvae.inert_pickle import Allowlist, BadPickle, Symbol, read_pickle, shown
from dalle_cli.errors import UserError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
VALUE_BYTES = 4
"""Size of a 32-bit float, the only supported type."""
MAX_PICKLE_BYTES = 1 << 26
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class Storage:
    """A contiguous array of ``numel`` 32-bit floats in the file."""

    key: str
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file, which lies within its storage and is no larger than it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TorchFile(Protocol):
    """An open file with its pickled object ``root``."""

    root: object

    def storage_bytes(self, storage: Storage) -> bytes:
        """Return the storage's values, or raise BadPickle if the file lacks them."""


@contextmanager
def open_torch_file(path: Path, classes: frozenset[str]) -> Iterator[TorchFile]:
    """Open the file at ``path``; its pickle may hold objects of ``classes`` ("module name"), tensors and plain values.

    Raises:
        UserError: the file cannot be read, is damaged or holds anything else, or the block raised BadPickle.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file; name a file of torch.save")
    try:
        with path.open("rb") as file:
            start = file.read(len(ZIP_MAGIC))
            if not start:
                raise BadPickle("empty")
            yield _ZipFile(file, classes) if start == ZIP_MAGIC else _LegacyFile(file, classes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); name a file of torch.save") from None
    except BadPickle as error:
        raise UserError(f"{path}: {error}; download the file again from its publisher") from error


def read_tensors(file: TorchFile, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with its values, a contiguous float32 tensor; raise BadPickle if the file lacks them."""
    last, values = None, np.zeros(0, np.float32)
    for name, tensor in tensors.items():
        if tensor.storage != last:  # neighbours may share one large storage
            last = tensor.storage
            values = np.frombuffer(file.storage_bytes(last), "<f4").astype(np.float32)
        view = torch.from_numpy(values).as_strided(tensor.shape, tensor.stride, tensor.offset)
        yield name, view.clone(memory_format=torch.contiguous_format)


class _ZipFile:
    def __init__(self, file: IO[bytes], classes: frozenset[str]) -> None:
        try:
            self.archive = zipfile.ZipFile(file)
        except Exception as error:  # a hostile archive can make zipfile raise anything
            raise BadPickle(f"a damaged zip archive ({error})") from error
        names = [name for name in self.archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise BadPickle("a zip archive, but not of torch.save (no data.pkl in it)")
        self.folder = names[0].removesuffix("data.pkl")
        if f"{self.folder}constants.pkl" in self.archive.namelist():
            raise BadPickle("TorchScript, not a pickled module")
        if f"{self.folder}byteorder" in self.archive.namelist() and self._record("byteorder", 8) != b"little":
            raise BadPickle("its values are not little-endian")
        pickled = io.BytesIO(self._record("data.pkl", MAX_PICKLE_BYTES))
        self.root = read_pickle(pickled, _allowlist(classes))

    def storage_bytes(self, storage: Storage) -> bytes:
        data = self._record(f"data/{storage.key}", storage.numel * VALUE_BYTES)
        return _of_length(data, storage)

    def _record(self, name: str, max_bytes: int) -> bytes:
        try:
            record = self.archive.getinfo(self.folder + name)
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > max_bytes:
                raise BadPickle(f"its record {name!r} is compressed, or longer than it can be")
            return self.archive.read(record)
        except BadPickle:
            raise
        except Exception as error:
            raise BadPickle(f"its record {name!r} is missing or damaged ({error})") from error


class _LegacyFile:
    def __init__(self, file: IO[bytes], classes: frozenset[str]) -> None:
        # Reading beyond the end of a memory map allocates nothing, whatever length a hostile opcode names.
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stream: IO[bytes] = self.map  # type: ignore[assignment]
        plain = _allowlist(frozenset())
        if read_pickle(stream, plain) != LEGACY_MAGIC or read_pickle(stream, plain) != LEGACY_PROTOCOL:
            raise BadPickle("not a file of torch.save")
        machine = read_pickle(stream, plain)
        if type(machine) is not dict or machine.get("little_endian") is not True:
            raise BadPickle("its values are not little-endian")
        self.root = read_pickle(stream, _allowlist(classes))
        keys = read_pickle(stream, plain)
        if type(keys) is not list or not all(type(key) is str for key in keys):
            raise BadPickle("damaged: the list of its storages is missing")
        self.offsets = self._index(keys)

    def storage_bytes(self, storage: Storage) -> bytes:
        start, numel = self.offsets.get(storage.key, (0, 0))
        return _of_length(self.map[start : start + numel * VALUE_BYTES], storage)

    def _index(self, keys: list[str]) -> dict[str, tuple[int, int]]:
        """Return the offset in bytes and the number of each storage's values."""
        offsets: dict[str, tuple[int, int]] = {}
        at = self.map.tell()
        for key in keys:
            numel = int.from_bytes(self.map[at : at + 8], "little")
            at += 8
            offsets[key] = at, numel
            at += numel * VALUE_BYTES
            if at > len(self.map):
                raise BadPickle("cut short: its last values are missing")
        return offsets


def _of_length(data: bytes, storage: Storage) -> bytes:
    if len(data) != storage.numel * VALUE_BYTES:
        raise BadPickle(f"damaged: storage {storage.key!r} does not have its {storage.numel} values")
    return data


def _allowlist(classes: frozenset[str]) -> Allowlist:
    return Allowlist(
        classes=classes,
        functions={
            "collections OrderedDict": _ordered_dict,
            "__builtin__ set": _set,
            "torch device": _device,
            "torch._utils _rebuild_tensor_v2": _tensor,
            "torch._utils _rebuild_parameter": _parameter,
        },
        symbols=frozenset({"torch FloatStorage"}),
        persistent=_persistent,
    )


def _persistent(saved: object) -> object:
    """Return a storage or, in the older layout, a class; the source code beside the class is ignored."""
    match saved:
        case ("storage", Symbol("torch FloatStorage"), str(key), str(), int(numel), *view) if view in ([], [None]):
            if numel >= 0:
                return Storage(key, numel)
        case ("module", Symbol() as symbol, str() | None, str() | None):
            return symbol
    raise BadPickle("it has a persistent id that is neither a storage of 32-bit floats nor a class")


def _ordered_dict(*arguments: object) -> dict[str, object]:
    if arguments:
        raise BadPickle("it calls 'collections.OrderedDict' with arguments")
    return {}


def _set(*arguments: object) -> tuple[object, ...]:
    match arguments:
        case ([],):
            return ()
    raise BadPickle("it makes a set that is not empty")


def _device(*arguments: object) -> str:
    match arguments:
        case (str(kind),) | (str(kind), int()):
            return kind
    raise BadPickle("it calls 'torch.device' with arguments that are not a device's")


def _parameter(*arguments: object) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), {**hooks}) if not hooks:
            return tensor
    raise BadPickle("it calls 'torch._utils._rebuild_parameter' with arguments that are not a parameter's")


def _tensor(*arguments: object) -> StoredTensor:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), {**hooks}) if not hooks:
            return _within(storage, offset, _natural_numbers(shape), _natural_numbers(stride))
    raise BadPickle("it calls 'torch._utils._rebuild_tensor_v2' with arguments that are not a tensor's")


def _natural_numbers(values: tuple[object, ...]) -> tuple[int, ...]:
    numbers = tuple(value for value in values if type(value) is int and value >= 0)
    if len(numbers) != len(values) or len(values) > MAX_DIMENSIONS:
        raise BadPickle("it has a tensor with an invalid shape or stride")
    return numbers


def _within(storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
    tensor = StoredTensor(storage, offset, shape, stride)
    if offset < 0 or len(shape) != len(stride) or 0 in shape:
        raise BadPickle("it has a tensor with an invalid shape or stride")
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if last >= storage.numel or tensor.numel > storage.numel:
        raise BadPickle(f"it has a tensor that does not lie within its storage {shown(storage.key)}")
    return tensor
