"""The state of a training run: weights, EMA weights, the optimizer's moments and the plateau schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dalle_cli.config.schema import ClipSettings, DvaeSettings, PriorSettings
from dalle_cli.data.batch_order import Order
from dalle_cli.distributed.engine import Engine, Optimizer, TorchEngine
from dalle_cli.errors import Damaged
from dalle_cli.precision.formats import MOMENTS
from dalle_cli.stores.checkpoint import STATE, Checkpoint, CheckpointContent, CheckpointShards
from dalle_cli.stores.tensor_files import Part, TensorFiles, require_like
from dalle_cli.stores.typed import Count, as_type
from dalle_cli.training.schedules import Plateau, learning_rate
from dalle_cli.training.updates import AdamUpdates
from dalle_cli.training.validation import BestValidation

Stage = DvaeSettings | PriorSettings | ClipSettings
"""A stage's settings in the recipe."""
EMA_WARMUP = 10
"""Constant of the EMA's warm-up: after t updates its decay is at most (1 + t) / (EMA_WARMUP + t)."""


@dataclass(frozen=True)
class _Schedules:
    """The schedules in a checkpoint's trainer state."""

    plateau: dict[str, int | float]
    order: Order = "consecutive windows"
    """Checkpoints of earlier versions do not name it."""
    best: BestValidation = field(default_factory=BestValidation)
    rounds: list[tuple[Count, Count]] = field(default_factory=list)


class TrainingState:
    """The weights, EMA weights and moments of the parts that this rank holds, and the plateau schedule.

    EMA weights are always in 32 bit. If they are not updated after every update, they are in the host's memory, as in
    the paper (appendix B.2).

    Args:
        engine: the model, whole or sharded.
        settings: the stage's settings.
        decayed: names of the parameters that weight decay applies to.
        seed: the seed of stochastic rounding in 16-bit training.
    """

    def __init__(self, engine: Engine, settings: Stage, decayed: set[str], seed: int = 0) -> None:
        self.engine, self.settings, self.names = engine, settings, engine.names
        self.ema = {name: self._start_ema(engine.read(name)) for name in self.names}
        self.optimizer: Optimizer = engine.own_optimizer or AdamUpdates(
            cast(TorchEngine, engine), decayed, settings.adam, seed
        )
        self.plateau = Plateau(settings.learning_rate)
        self.best = BestValidation()
        self.order: Order = "random blocks"
        """Name of the order of rows, the same throughout a run."""
        self.rounds: list[tuple[int, int]] = []
        """Further rounds of a run that was extended: the update after which each began, and its number of updates."""

    @property
    def last_update(self) -> int:
        """Number of updates of the whole run."""
        return sum(self.rounds[-1]) if self.rounds else self.settings.training.updates

    @property
    def out_of_patience(self) -> bool:
        """True if the settings' ``patience`` ends the run after its newest validation."""
        return self.best.exhausts(self.settings.training.patience)

    def due(self, every: int, done: int) -> bool:
        """Return whether what happens after each ``every`` updates, and after the last one, is due after ``done``."""
        return done % every == 0 or done == self.last_update

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that follows ``step`` updates."""
        rate, updates = self.settings.learning_rate, self.settings.training.updates
        begun = [each for each in self.rounds if each[0] <= step]
        if begun:
            first, updates = begun[-1]
            step, rate = step - first, rate.model_copy(update={"decay_updates": None})
        return learning_rate(rate, step, updates, self.plateau.halvings)

    def begin_round(self, step: int, updates: int) -> None:
        """Add a round of ``updates`` after ``step``, with its own learning-rate schedule and patience."""
        self.rounds.append((step, updates))
        self.plateau = Plateau(self.settings.learning_rate)
        self.best.validations_since = 0

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Update the EMA weights in every ``ema_every``th update, with the product of the decays since the last time.

        ``step`` is the number of updates before the current one.
        """
        done, training = step + 1, self.settings.training
        if done % training.ema_every:
            return
        limits = (
            (1 + t) / (EMA_WARMUP + t) if training.ema_warmup else 1.0 for t in range(done - training.ema_every, done)
        )
        share = 1 - math.prod(min(training.ema_decay, limit) for limit in limits)
        for name, averaged in self.ema.items():
            # One by one to save memory, because 16-bit weights are copied to 32 bit.
            averaged.lerp_(self.engine.read(name).to(averaged.device).float(), share)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give the model its EMA weights inside the block; a copy of its own is on the device of the EMA weights."""
        raw = {name: self.engine.read(name).to(averaged.device, copy=True) for name, averaged in self.ema.items()}
        self.engine.write(self.ema.items())
        try:
            yield
        finally:
            self.engine.write(raw.items())

    def weights_are_finite(self) -> bool:
        """Return whether this rank's parts of the weights are finite."""
        return all(bool(self.engine.read(name).isfinite().all()) for name in self.names)

    def checkpoint(self, step: int) -> CheckpointContent:
        """Return the whole state after ``step`` updates."""
        raw = {name: tensor.detach() for name, tensor in self.engine.model.state_dict().items()}
        return CheckpointContent(
            weights={"raw": raw, "ema": {**raw, **self.ema}},
            optimizer={f"{key}.{name}": value for name, key, value in self._moments()},
            trainer_state=self._trainer_state(step),
        )

    def checkpoint_shards(self, step: int) -> CheckpointShards:
        """Return the state that this rank saves after ``step`` updates."""
        self.engine.require_same_weights()
        raw, optimizer = self._parts(self.engine.read), {}
        for name, key, value in self._moments():
            part = self.engine.part_to_save(name, value) if value.dim() else Part(value)
            if part is not None and name in raw:
                optimizer[f"{key}.{name}"] = part
        errors = {name: self.engine.part_to_save(name, value) for name, value in self.engine.share_errors()}
        return CheckpointShards(
            weights={"raw": raw, "ema": self._parts(self.ema.__getitem__)},
            optimizer=optimizer,
            trainer_state=self._trainer_state(step),
            own=self.engine.rank_state(),
            errors={name: part for name, part in errors.items() if part is not None},
        )

    def load_schedules(self, checkpoint: Checkpoint) -> None:
        """Restore the schedules, the best validation and the order of rows of ``checkpoint``, but no tensors."""
        saved = as_type(_Schedules, checkpoint.trainer_state(), checkpoint.path / STATE)
        self.plateau = Plateau(self.settings.learning_rate, saved.plateau)
        self.best, self.rounds, self.order = saved.best, saved.rounds, saved.order

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the tensors of ``checkpoint``, which was checked, however many ranks saved it."""
        engine = self.engine
        raw, ema = checkpoint.files_of("raw"), checkpoint.files_of("ema")
        for files in (raw, ema):
            if lacking := set(self.names) - set(files.names()):
                raise Damaged(f"{files.whole}: is damaged: lacks {min(lacking)}; use an older checkpoint")
        if engine.sharded:
            engine.write(self._read(raw))
        else:
            tensors = raw.all()
            require_like(tensors, engine.model.state_dict(), raw.whole)
            engine.model.load_state_dict(tensors)
        for name, value in self._read(ema):
            self.ema[name].copy_(value)
        self.optimizer.load_moments(self._saved_moments(checkpoint.moments()))
        self.optimizer.load_trainer_state(checkpoint.trainer_state())
        engine.load_rank_state(checkpoint.own_state(engine.group.rank, engine.group.size))
        if (errors := checkpoint.errors()) is not None:
            engine.load_errors(self._read(errors))
        engine.release_gathered()

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield each of the optimizer's tensors with the name of its parameter and its own, such as ``exp_avg``."""
        for name in self.names:
            for key, value in self.optimizer.moments(name).items():
                yield name, key, value

    def _saved_moments(self, files: TensorFiles) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Read what ``Optimizer.moments`` returned of this rank's parts, one parameter after another."""
        labels: dict[str, list[str]] = {}
        for label in files.names():
            labels.setdefault(label.partition(".")[2], []).append(label)
        for name in self.names:
            values = {
                label.partition(".")[0]: files.read(label, self.engine.slab(name)) for label in labels.get(name, [])
            }
            if values:
                self._require_moments(name, values, files.whole)
                parts = {key: self._part(name, v, files) if v.dim() else v for key, v in values.items()}
                yield name, parts

    def _require_moments(self, name: str, values: Mapping[str, Tensor], file: Path) -> None:
        """Raise Damaged unless ``values`` are those of Adam, whose fused form would write beyond others."""
        moments = [values[key] for key in MOMENTS if key in values]
        right = values.keys() == {"step", *MOMENTS} and not values["step"].dim()
        if not right or any(value.dtype not in (torch.float32, torch.uint16) for value in moments):
            found = {key: f"{value.dtype} {tuple(value.shape)}" for key, value in values.items()}
            raise Damaged(f"{file}: is damaged: the moments of {name} are {found}; use an older checkpoint")

    def _part(self, name: str, slab: Tensor, files: TensorFiles) -> Tensor:
        """Cut this rank's part out of a slab; raise Damaged unless it has the shape and kind of a parameter's part."""
        wanted = self.ema[name].shape
        try:
            part = self.engine.cut(name, slab)
        except (RuntimeError, IndexError):
            part = slab
        is_number = part.is_floating_point() or part.dtype == torch.uint16  # which 16-bit formats are held in
        if part.shape != wanted or not is_number:
            raise Damaged(
                f"{files.whole}: is damaged: {name} is {part.dtype} {tuple(part.shape)} in place of {tuple(wanted)}; "
                "use an older checkpoint"
            )
        return part

    def _trainer_state(self, step: int) -> dict[str, Any]:
        rounds = {"rounds": self.rounds} if self.rounds else {}
        return {
            "step": step,
            "plateau": self.plateau.state,
            "best": asdict(self.best),
            "order": self.order,
            **rounds,
            **self.optimizer.trainer_state(),
        }

    def _parts(self, value: Callable[[str], Tensor]) -> dict[str, Part]:
        """Return what this rank saves of the parts that ``value`` returns by their names."""
        found = {name: self.engine.part_to_save(name, value(name)) for name in self.names}
        return {name: part for name, part in found.items() if part is not None}

    def _start_ema(self, weights: Tensor) -> Tensor:
        device = weights.device if self.settings.training.ema_every == 1 else torch.device("cpu")
        return torch.empty_like(weights, dtype=torch.float32, device=device).copy_(weights)

    def _read(self, files: TensorFiles) -> Iterator[tuple[str, Tensor]]:
        """Read this rank's parts of what ``files`` hold of the parameters, one after another."""
        held = set(files.names())
        for name in [name for name in self.names if name in held]:
            yield name, self._part(name, files.read(name, self.engine.slab(name)), files)
