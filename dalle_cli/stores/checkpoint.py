"""Checkpoints: folders of safetensors, a recipe and a manifest; no pickle is ever read.

A training run's folder holds ``step-00001000/`` and so on, each a checkpoint, and ``metrics.jsonl``. Commands take
either one checkpoint or the run's folder, which stands for its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from dalle_cli.config.load import dump_recipe, load_recipe
from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import Damaged, UserError
from dalle_cli.progress import log
from dalle_cli.stores.files import explain_os_errors, json_text, new_directory, rename_synced, sha256_file, write_json
from dalle_cli.stores.tensor_files import (
    Part,
    TensorFiles,
    index_entries,
    join_entries,
    part_file,
    require_like,
    save_tensors,
)
from dalle_cli.stores.typed import Count, as_type, read_typed

if TYPE_CHECKING:
    import torch
    from torch import nn

FORMAT_VERSION = 2
"""Version 1 had no checksum of the manifest itself."""
Kind = Literal["dvae", "prior", "clip"]
Weights = Literal["ema", "raw"]
Which = Literal["best", "last"]
"""The checkpoint that a run's folder stands for: the one of the best validation, or the newest."""
STATE = Path("trainer", "state.json")
"""The trainer's state without tensors, in a checkpoint."""
_STEP = re.compile("step-[0-9]{8}")
_NAMES: dict[Weights, str] = {"raw": "model", "ema": "ema"}


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss of a run, and the update after which it was found."""

    step: int
    loss: float
    by: str = "loss"
    """Name of the loss among the checkpoint's metrics."""

    @property
    def name(self) -> str:
        """The loss in words."""
        return "held-out loss" if self.by == "loss" else f"held-out {self.by} loss"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, by its manifest. Every method raises UserError if a file it reads is missing or damaged."""

    path: Path
    kind: Kind
    step: Count
    belongs: dict[str, str] = field(default_factory=dict)
    """Hashes of the artifacts it was trained with, such as ``{"tokenizer": ..., "dvae": ...}``."""
    metrics: dict[str, float] = field(default_factory=dict)
    best: Best | None = None
    """The best validation of its run until it was saved."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of weights."""
    others: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the recipe and of each file of the trainer's state, by the path in the checkpoint."""
    identity: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = ""
    """Identity of the EMA weights, which other stages use: the SHA-256 of their file, or of their files' SHA-256."""
    last_update: Count | None = None
    """Number of updates of the whole run; None in checkpoints of earlier versions, whose runs were never extended."""
    ended_early: bool = False
    """``patience`` ended the run here, before its last update."""

    def updates(self) -> int:
        """Return the number of updates of the whole run."""
        return self.last_update or int(getattr(self.recipe(), self.kind).training.updates)

    def recipe(self) -> Recipe:
        if "recipe.yaml" in self.others:
            self._check([self.path / "recipe.yaml"])
        return load_recipe(self.path / "recipe.yaml")

    def tensors(self, weights: Weights = "ema") -> dict[str, torch.Tensor]:
        """Return weights by name, on the CPU."""
        return self.checked_files_of(weights).all()

    def load_into(self, model: nn.Module, *, assign: bool = False) -> None:
        """Give a model its EMA weights; with ``assign``, the model's tensors become those that were read."""
        found = self.tensors("ema")
        require_like(found, model.state_dict(), self.files_of("ema").whole)
        model.load_state_dict(found, assign=assign)

    def files_of(self, weights: Weights) -> TensorFiles:
        """Return the files of weights, not yet checked against the manifest; see ``check``."""
        return TensorFiles(self.path, _NAMES[weights])

    def checked_files_of(self, weights: Weights) -> TensorFiles:
        """Return the files of weights, each checked against the manifest."""
        files = self.files_of(weights)
        self._check(files.files())
        return files

    def check(self, rank: int, size: int) -> None:
        """Check this rank's share of all files against the manifest."""
        self._check([self.path / name for name in sorted({**self.files, **self.others})][rank::size])

    def trainer(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the optimizer's tensors by name, and the rest of the trainer's state."""
        return self.moments().all(), self.trainer_state()

    def moments(self) -> TensorFiles:
        """Return the files of the optimizer's tensors."""
        return TensorFiles(self.path / "trainer", "optimizer")

    def errors(self) -> TensorFiles | None:
        """Return the files of the errors of compressed gradients, if there are any."""
        files = TensorFiles(self.path / "trainer", "errors")
        return files if "trainer/errors.index.json" in self.others else None

    def trainer_state(self) -> dict[str, Any]:
        """Return the trainer's state without the optimizer's tensors."""
        return read_typed(dict[str, Any], self.path / STATE)

    def own_state(self, rank: int, size: int) -> dict[str, torch.Tensor] | None:
        """Return the tensors that a rank saved for itself; None if the checkpoint was not saved by ``size`` ranks."""
        name = part_file("own", rank, size).removesuffix(".safetensors")
        files = TensorFiles(self.path / "trainer", name)
        return files.all() if files.whole.is_file() else None

    def _check(self, files: Iterable[Path]) -> None:
        known = {**self.files, **self.others}
        for file in files:
            mend = "restore it or use an older checkpoint"
            if not file.is_file():
                raise Damaged(f"{file}: missing; {mend}")
            if sha256_file(file) != known.get(file.relative_to(self.path).as_posix()):
                raise Damaged(f"{file}: damaged: its sha256 is not the manifest's; {mend}")


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint's recipe and the facts in its manifest."""

    kind: Kind
    step: int
    recipe: Recipe
    belongs: Mapping[str, str]
    metrics: Mapping[str, float]
    best: Best | None = None
    last_update: int | None = None
    """Number of updates of the whole run, with those of its extensions; None: the recipe's."""
    ended_early: bool = False
    """``patience`` ends the run here, before its last update."""


@dataclass(frozen=True)
class CheckpointContent:
    """Tensors and trainer's state to save."""

    weights: Mapping[Weights, Mapping[str, torch.Tensor]]
    optimizer: Mapping[str, torch.Tensor]
    trainer_state: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointShards:
    """Tensors and trainer's state that one rank saves."""

    weights: Mapping[Weights, Mapping[str, Part]]
    optimizer: Mapping[str, Part]
    trainer_state: Mapping[str, Any]
    own: Mapping[str, torch.Tensor]
    """Tensors for this rank alone, which it reads back if the run resumes with the same number of ranks."""
    errors: Mapping[str, Part] = field(default_factory=dict)
    """Errors of compressed gradients, summed over all nodes, by parameter."""


class Writers(Protocol):
    """Ranks that write a checkpoint together, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of each rank."""


def save_checkpoint(path: Path, facts: CheckpointFacts, content: CheckpointContent) -> None:
    """Write a checkpoint beside ``path`` and rename it into place.

    Raises:
        UserError: the disk is full or ``path`` may not be written; earlier checkpoints are kept.
    """
    with new_directory(path) as folder:
        files = {}
        for which, tensors in content.weights.items():
            file = TensorFiles(folder, _NAMES[which]).whole
            save_tensors(tensors, file)
            files[file.name] = sha256_file(file)
        (folder / "trainer").mkdir()
        save_tensors(content.optimizer, folder / "trainer" / "optimizer.safetensors")
        write_json(folder / "trainer" / "state.json", dict(content.trainer_state))
        others = ("trainer/optimizer.safetensors", "trainer/state.json")
        write_manifest(folder, facts, files, {name: sha256_file(folder / name) for name in others})


def save_sharded_checkpoint(path: Path, writers: Writers, facts: CheckpointFacts, shards: CheckpointShards) -> None:
    """Write a checkpoint by several ranks, each of which writes the parts that it holds; see ``TensorFiles``.

    All ranks must see the same folder. The checkpoint is renamed into place once all have written.

    Raises:
        UserError: on every rank, if one of them could not write; earlier checkpoints are kept.
    """
    beside = path.with_name(f".{path.name}.partial")
    leads = writers.rank == 0

    def begin() -> bool:
        if leads:
            shutil.rmtree(beside, ignore_errors=True)
            (beside / "trainer").mkdir(parents=True)
        return bool(shards.weights["raw"])

    def write() -> dict[str, Any]:
        entries: dict[str, Any] = {}
        hashes: dict[str, str] = {}
        others: dict[str, str] = {}
        if shards.own:
            name = f"trainer/{part_file('own', writers.rank, writers.size)}"
            save_tensors(shards.own, beside / name)
            others[name] = sha256_file(beside / name)
        if holders[writers.rank]:
            place, count = sum(holders[: writers.rank]), sum(holders)
            named = {_NAMES[which]: parts for which, parts in shards.weights.items()}
            named |= {"trainer/optimizer": shards.optimizer}
            named |= {"trainer/errors": shards.errors} if shards.errors else {}
            for name, parts in named.items():
                file = beside / part_file(name, place, count)
                save_tensors({key: part.value for key, part in parts.items()}, file)
                entries[name] = index_entries(file.name, parts)
                known = hashes if file.parent == beside else others
                known[file.relative_to(beside).as_posix()] = sha256_file(file)
        return {"entries": entries, "hashes": hashes, "others": others}

    def finish() -> None:
        if not leads:
            return
        names = list(dict.fromkeys(name for each in written for name in each["entries"]))
        for name in names:
            index = join_entries([each["entries"][name] for each in written if name in each["entries"]])
            write_json(beside / f"{name}.index.json", index)
        write_json(beside / "trainer" / "state.json", dict(shards.trainer_state))
        files, others = (
            {name: digest for each in written for name, digest in each[which].items()} for which in ("hashes", "others")
        )
        for name in ("trainer/state.json", *(f"{name}.index.json" for name in names)):
            others[name] = sha256_file(beside / name)
        write_manifest(beside, facts, files, others)
        rename_synced(beside, path)

    try:
        holders = _on_all(path, writers, begin)
        written = _on_all(path, writers, write)
        _on_all(path, writers, finish)
    except UserError:
        if leads:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def _on_all(path: Path, writers: Writers, work: Callable[[], Any]) -> list[Any]:
    """Do ``work`` on every rank and return all results; if it fails on one rank, raise UserError on every rank."""
    result, mistake = None, ""
    try:
        with explain_os_errors(path):
            result = work()
    except (UserError, OSError) as error:
        mistake = str(error)
    found = writers.gather((result, mistake))
    for rank, (_, message) in enumerate(found):
        if message:
            raise UserError(f"rank {rank} of {writers.size}: {message}")
    return [result for result, _ in found]


def write_manifest(
    folder: Path,
    facts: CheckpointFacts,
    files: Mapping[str, str],
    others: Mapping[str, str],
    identity: str | None = None,
) -> None:
    """Write the recipe and the manifest of a checkpoint whose weights are written.

    ``files`` maps each file of weights to its SHA-256, ``others`` each further file; ``identity`` is that of the
    checkpoint they were exported from.
    """
    if identity is None:
        ema = "".join(digest for name, digest in sorted(files.items()) if name.startswith(_NAMES["ema"]))
        identity = ema if len(ema) == 64 else hashlib.sha256(ema.encode()).hexdigest()
    (folder / "recipe.yaml").write_text(dump_recipe(facts.recipe), encoding="utf-8")
    manifest = {
        "format": "dalle-checkpoint",
        "version": FORMAT_VERSION,
        "kind": facts.kind,
        "step": facts.step,
        "belongs": dict(facts.belongs),
        "metrics": dict(facts.metrics),
        "last_update": facts.last_update,
        "ended_early": facts.ended_early,
        "best": None if facts.best is None else asdict(facts.best),
        "files": dict(files),
        "others": {**others, "recipe.yaml": sha256_file(folder / "recipe.yaml")},
        "identity": identity,
    }
    write_json(folder / "manifest.json", {**manifest, "checksum": manifest_checksum(manifest)})


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, without the checksum in it."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def steps_in(run: Path) -> list[Path]:
    """Return the complete checkpoints in a run's folder, oldest first."""
    return [folder for folder in step_folders(run) if (folder / "manifest.json").is_file()]


def step_folders(run: Path) -> list[Path]:
    """Return the folders with names that training gives them, oldest first; others are the user's."""
    return sorted(p for p in run.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir())


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` updates."""
    return run / f"step-{step:08d}"


def prune(run: Path, keep: int, best: Best | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one, and checkpoints left half deleted."""
    wanted = {*steps_in(run)[-keep:], *([] if best is None else [step_folder(run, best.step)])}
    for old in {folder for folder in step_folders(run) if not folder.is_symlink()} - wanted:
        (old / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(old)


def open_checkpoint(path: Path, kind: Kind | None = None, which: Which = "best") -> Checkpoint:
    """Open a checkpoint, or the best or the newest one of a stage, or of the stage ``kind`` in the folder of a run.

    The best one is that of the lowest held-out loss; a run without validations has only its newest.

    Raises:
        UserError: there is no checkpoint, it is of another kind or of a newer format, or its manifest is damaged.
    """
    folder = path
    if not (path / "manifest.json").is_file():
        steps = steps_in(path) if path.is_dir() else []
        if not steps and kind is not None:
            if path.name != kind and (path / kind).is_dir():
                return open_checkpoint(path / kind, kind, which)
            run = path.parent if path.name == kind else path
            if path.name == kind or RunFolders(run).begun:
                raise UserError(f"{run}: this run has no {kind} yet; train it with dalle train-{kind}")
        if not steps:
            what = f"a {kind} checkpoint" if kind else "a checkpoint"
            raise UserError(f"{path}: holds no checkpoint; name {what}: a folder with manifest.json, or its run")
        newest = _read_manifest(steps[-1], kind)
        if which == "last" or newest.best is None or newest.best.step == newest.step:
            return newest
        folder = step_folder(path, newest.best.step)
        if folder not in steps:
            return newest
    return _read_manifest(folder, kind)


def open_stage(path: Path, kind: Kind, which: Which = "best") -> Checkpoint:
    """Open the checkpoint of a stage that another stage uses; log at which update it stands if it is not finished.

    Raises:
        UserError: see ``open_checkpoint``.
    """
    found = open_checkpoint(path, kind, which)
    run = found.path.parent
    if found.path in steps_in(run):
        newest = open_checkpoint(run, kind, "last")
        if newest.step < newest.updates() and not newest.ended_early:
            log(
                f"{run}: its training is not finished; it stands at update {newest.step:,} of {newest.updates():,}, "
                f"and {found.path.name} is used"
            )
    return found


def _read_manifest(folder: Path, kind: Kind | None) -> Checkpoint:
    manifest_path = folder / "manifest.json"
    try:
        text = manifest_path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        version = int(manifest["version"])
        if version > FORMAT_VERSION:
            raise UserError(f"{manifest_path}: format version {version} is newer than this dalle reads; upgrade dalle")
        checked = version == 1 or (text == json_text(manifest) and manifest["checksum"] == manifest_checksum(manifest))
        if not checked:
            raise ValueError("its checksum is not that of its content")
        identity = manifest.get("identity") or manifest["files"]["ema.safetensors"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{manifest_path}: damaged or not a checkpoint's manifest ({error!r})") from None
    found = as_type(Checkpoint, {**manifest, "path": folder, "identity": identity}, manifest_path)
    if _STEP.fullmatch(folder.name) and folder != step_folder(folder.parent, found.step):
        raise Damaged(f"{manifest_path}: damaged: says update {found.step}, unlike its folder's name")
    if kind is not None and found.kind != kind:
        raise UserError(f"{folder}: is a {found.kind} checkpoint where a {kind} is needed")
    return found


def check_belongs(user: Checkpoint, role: str, given_hash: str, given_name: str) -> None:
    """Check that an artifact, whose ``role`` is for example ``dvae``, is the one a checkpoint was trained with.

    Raises:
        UserError: the checkpoint was trained with another one; both are named.
    """
    expected = user.belongs.get(role)
    if expected is not None and expected != given_hash:
        raise UserError(
            f"{user.path} was trained with the {role} {expected[:12]}, but {given_name} is {given_hash[:12]}; "
            f"give the {role} it belongs to"
        )
