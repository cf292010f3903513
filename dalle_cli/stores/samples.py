"""Samples on disk: a PNG of each, and a Zarr store of their tokens whose attribute ``rows`` counts the committed rows.

While the model draws the next batch, threads encode PNGs and commit batches in order. The rows of a batch are committed
once all its PNGs and tokens are on the disk, so that a power cut loses no committed row.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from dalle_cli.config.run_folders import run_of
from dalle_cli.errors import Damaged, UserError
from dalle_cli.stores.checksums import write_checksums
from dalle_cli.stores.files import delete_unfinished, explain_os_errors, new_directory, plain_name, sync
from dalle_cli.stores.shards import Shard
from dalle_cli.stores.typed import Count, as_type, explain_damage
from dalle_cli.stores.zarr_files import sync_chunks, write_attributes

STORE = "samples.zarr"
ENCODERS = 4
"""Number of threads that encode PNGs; they take a small part of the model's time."""
METADATA = [f"{STORE}/{name}zarr.json" for name in ("", "tokens/", "log_likelihood/", "prompts/")]
"""Files of a complete folder of samples whose checksums are kept; arrays and PNGs have checksums of their own."""
CHUNK = 64
"""Number of rows of a chunk of the store."""
WRITES_ZEROS = {"array.write_empty_chunks": True}
"""Setting of zarr while an array is opened: chunks of zeros get files, so that no missing one is taken for zeros."""
PROMPTS_A_CHUNK = 4096
FORMAT_VERSION = 3
"""Version 2, which is read too, had the prompts in the attributes, which every batch writes anew, and all pictures in
one folder."""
READ_VERSIONS = (2, 3)
CAPTION_IN_NAME = 40
"""Number of a caption's characters in the file names of its samples."""
PROMPTS_A_FOLDER = 1000
"""Number of prompts from which pictures lie in folders of so many prompts each, such as ``00002000/``."""


def png_name(prompt: int, index: int, caption: str, in_folders: bool = False) -> str:
    """Return a sample's file, with how its caption begins; names sort by prompt, then by index."""
    name = f"{prompt:05d}-{plain_name(caption.lower())[:CAPTION_IN_NAME].strip('_.')}-{index:05d}.png"
    return f"{prompt // PROMPTS_A_FOLDER * PROMPTS_A_FOLDER:08d}/{name}" if in_folders else name


def request_rows(shard: Shard, prompts: int, n: int) -> range:
    """Return a share's rows of ``n`` samples per prompt; a prompt is split only if prompts are fewer than shares."""
    return shard.rows(prompts * n, n if prompts >= shard.of else 1)


@dataclass(frozen=True)
class ManifestLines:
    """The lines that ``dalle sample`` prints for the samples of a store; for ``in_folders`` see ``png_name``."""

    store: Path
    prompts: Sequence[str]
    seed: int
    in_folders: bool

    def line(self, row: int, prompt: int, index: int, log_likelihood: float) -> dict[str, Any]:
        """Return the line of the store's ``row``, which is sample ``index`` of a prompt."""
        caption = self.prompts[prompt]
        return {
            "prompt": caption,
            "prompt_index": prompt,
            "index": index,
            "png": str(self.store.parent / png_name(prompt, index, caption, self.in_folders)),
            "store": str(self.store),
            "row": row,
            "seed": self.seed,
            "log_likelihood": round(float(log_likelihood), 4),
        }


def run_of_store(store: Path, attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return the key ``run`` of a store's lines, given its ``attributes``; nothing if the store lies in its run."""
    return {"run": os.path.normpath(store.parent.resolve() / attributes["run"])} if "run" in attributes else {}


@dataclass(frozen=True)
class StoredRequest:
    """The request that a store's samples answer."""

    prompts: list[str]
    settings: dict[str, Any]
    """The ``sampling`` block, with the number ``n`` of samples a prompt."""
    seed: int
    prior: str = ""
    first: Count = 0
    """Index of a prompt's first sample."""
    shard: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.settings.get("n"), int) or self.n < 1:
            raise ValueError("settings.n must be a number from 1 on")

    @property
    def n(self) -> int:
        return int(self.settings["n"])


@dataclass(frozen=True)
class SampleAttributes:
    """The attributes of a sample store: its number of committed rows, its request and its run, if that is elsewhere."""

    version: int
    rows: Count
    request: StoredRequest
    run: str | None = None

    @property
    def in_folders(self) -> bool:
        """See ``png_name``."""
        return has_folders(self.version, self.request.prompts)


def read_attributes(group: Any, store: Path) -> SampleAttributes:
    """Return the attributes of the Zarr group of a sample store.

    Raises:
        UserError: they are of another format, or damaged.
    """
    require_version(group.attrs, store)
    attributes: dict[str, Any] = dict(group.attrs)
    if attributes["version"] > 2:
        with explain_damage(store / "prompts"):
            prompts = [str(prompt) for prompt in group["prompts"][:]]
            if hash_of(prompts) != attributes["request"]["prompts_sha256"]:
                raise Damaged(f"{store / 'prompts'}: holds other prompts than were written; draw the samples again")
            attributes["request"] = {**attributes["request"], "prompts": prompts}
    return as_type(SampleAttributes, attributes, store)


def settings_in(out: Path) -> dict[str, Any]:
    """Return the ``sampling`` block of the samples in the folder ``out``, empty if there are none.

    Raises:
        UserError: they are of another format, or damaged.
    """
    if not (out / STORE / "zarr.json").is_file():
        return {}
    return read_attributes(_open(out), out / STORE).request.settings


def prior_of(store: Path) -> str | None:
    """Return the hash of the prior that drew the samples of a store, or None if the store is not there any more.

    Raises:
        UserError: it is of another format, or damaged.
    """
    return read_attributes(_open(store.parent), store).request.prior if (store / "zarr.json").is_file() else None


def has_folders(version: int, prompts: Sequence[str]) -> bool:
    """Return whether the pictures of a store of this version lie in folders; see ``png_name``."""
    return version > 2 and len(prompts) > PROMPTS_A_FOLDER


def hash_of(values: list[str]) -> str:
    """Return the SHA-256 of a list of strings."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def require_version(attributes: Mapping[str, Any], store: Path) -> None:
    """Raise UserError unless this version reads a store with these ``attributes``."""
    if (found := attributes.get("version")) not in READ_VERSIONS:
        raise UserError(
            f"{store}: its samples are of format {found!r}, and this version reads formats 2 and 3; delete the folder "
            "and draw them again, or choose another --out"
        )


class SampleStore:
    """The ``rows`` samples of one request, of grid x grid tokens each, in the folder ``out``, new or begun before.

    ``run`` is the folder of the prior's run; a store outside it records it, so that ``dalle rerank`` finds its CLIP.

    Used as a context manager, it starts the threads that ``add`` needs and waits for them at the end. Two requests are
    the same if their ``identity`` is.

    The caller owns the folder, so that no other process writes there.

    Raises:
        UserError: ``out`` holds something else, or samples of another request.
    """

    def __init__(self, out: Path, identity: dict[str, Any], rows: int, grid: int, run: Path) -> None:
        self.out = out
        if not out.exists():
            _create(out, identity, rows, grid, run)
        elif not (out / STORE / "zarr.json").is_file():
            raise UserError(f"{out}: exists and holds no samples; choose another --out")
        self._group = _open(out)
        require_version(self._group.attrs, out / STORE)
        version = as_type(Count, self._group.attrs["version"], out / STORE)
        self.in_folders = has_folders(version, identity["prompts"])
        """See ``png_name``."""
        if self._group.attrs.get("request") != json.loads(json.dumps(identity if version == 2 else _short(identity))):
            raise UserError(f"{out}: holds samples of other prompts, settings or models; choose another --out")
        for left in (out / STORE).rglob("*.partial"):  # a process was killed while it wrote a chunk
            left.unlink(missing_ok=True)
        delete_unfinished(out / STORE)
        # A process may have been killed between the last commit and this.
        self._write_checksums()

    @property
    def committed(self) -> int:
        return as_type(Count, self._group.attrs.get("rows"), self.out / STORE)

    @property
    def elsewhere(self) -> dict[str, str]:
        """See ``run_of_store``."""
        return run_of_store(self.out / STORE, self._group.attrs)

    def tokens(self, rows: Sequence[int]) -> np.ndarray:
        """Return the tokens of some committed rows, (len(rows), grid, grid) uint16."""
        with explain_damage(self.out / STORE):
            found: np.ndarray = self._group["tokens"].oindex[np.asarray(rows)]
        return found

    def log_likelihood(self) -> np.ndarray:
        """Return the log-likelihood of each committed row, float64."""
        found: np.ndarray = self._group["log_likelihood"][: self.committed]
        return found

    def __enter__(self) -> SampleStore:
        self._encoders = ThreadPoolExecutor(ENCODERS, "png")
        self._committer = ThreadPoolExecutor(1, "commit")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._committer.shutdown()
        self._encoders.shutdown()

    def add(
        self, row: int, tokens: np.ndarray, log_likelihood: np.ndarray, pictures: np.ndarray, names: list[str]
    ) -> Future[None]:
        """Write and commit rows from ``row`` on in the background; the future ends when they are committed, or fails.

        ``tokens`` is (n, grid, grid), ``log_likelihood`` (n,), and ``pictures`` (n, H, W, 3) uint8; ``names`` are the
        file names of the pictures.
        """
        return self._committer.submit(self._commit, row, tokens, log_likelihood, pictures, names)

    def _commit(
        self, row: int, tokens: np.ndarray, log_likelihood: np.ndarray, pictures: np.ndarray, names: list[str]
    ) -> None:
        import zarr

        if row != self.committed:  # an earlier batch failed
            return
        with explain_os_errors(self.out):
            list(self._encoders.map(self.save, pictures, names))
            self._sync_folders(names)
            rows = range(row, row + len(tokens))
            for name, values in (("tokens", tokens), ("log_likelihood", log_likelihood)):
                with zarr.config.set(WRITES_ZEROS):
                    array = self._group[name]
                array[row : rows.stop] = values
                sync_chunks(self.out / STORE / name, array, rows)
            write_attributes(self.out / STORE, {**self._group.attrs, "rows": rows.stop})
            self._group = _open(self.out)
            self._write_checksums()

    def _write_checksums(self) -> None:
        """Write the checksums of the metadata once all samples are committed."""
        if self.committed == self._group["tokens"].shape[0]:
            write_checksums(self.out, [name for name in METADATA if (self.out / name).is_file()])

    def save_all(self, pictures: Iterable[np.ndarray], names: Sequence[str]) -> None:
        """Write pictures (H, W, 3) uint8 of the store, and have them on the disk."""
        for picture, name in zip(pictures, names, strict=True):
            self.save(picture, name)
        self._sync_folders(names)

    def save(self, picture: np.ndarray, name: str) -> None:
        """Write a picture (H, W, 3) uint8 of the store, and have its content on the disk."""
        file = self.out / name
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(file)
        sync(file)

    def _sync_folders(self, names: Sequence[str]) -> None:
        sync(*{(self.out / name).parent for name in names} | {self.out})


def _short(identity: dict[str, Any]) -> dict[str, Any]:
    """Return a request with hashes of its prompts and given pictures in their place."""
    short = {name: value for name, value in identity.items() if name != "prompts"}
    if "prime" in short:
        prime = short["prime"]
        short["prime"] = {"rows": prime["rows"], "pictures_sha256": hash_of(prime["pictures"])}
    return {**short, "prompts_sha256": hash_of(identity["prompts"])}


def _create(out: Path, identity: dict[str, Any], rows: int, grid: int, run: Path) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    with new_directory(out) as folder:
        group = zarr.open_group(str(folder / STORE), mode="a", zarr_format=3)
        chunk = min(rows, CHUNK)
        checked: dict[str, Any] = {
            "compressors": ZstdCodec(checksum=True),
            "config": {"write_empty_chunks": True},
        }
        group.create_array("tokens", shape=(rows, grid, grid), chunks=(chunk, grid, grid), dtype="uint16", **checked)
        group.create_array("log_likelihood", shape=(rows,), chunks=(chunk,), dtype="float64", **checked)
        prompts = np.array(identity["prompts"], dtype=object)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that its string type has no frozen specification yet
            texts = group.create_array(
                "prompts", shape=prompts.shape, chunks=(min(len(prompts), PROMPTS_A_CHUNK),), dtype="str", **checked
            )
            texts[:] = prompts
        group.attrs.update({"format": "dalle-samples", "version": FORMAT_VERSION, "rows": 0})
        group.attrs["request"] = _short(identity)
        if run_of(out).root != run.resolve():
            group.attrs["run"] = os.path.relpath(run.resolve(), out.resolve())


def _open(out: Path) -> Any:
    import zarr

    with explain_damage(out / STORE):
        return zarr.open_group(str(out / STORE), mode="a", zarr_format=3)
