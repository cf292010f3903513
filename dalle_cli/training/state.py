"""The state of a training run: weights, EMA weights, the optimizer's moments and the plateau schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle_cli.config.schema import Adam, ClipSettings, DvaeSettings, PriorSettings
from dalle_cli.distributed.engine import Engine
from dalle_cli.precision.adam import Adam16
from dalle_cli.precision.gradient_scaling import GradientScaling
from dalle_cli.stores.checkpoint import STATE, Checkpoint, CheckpointContent, CheckpointShards
from dalle_cli.stores.tensor_files import Part, TensorFiles
from dalle_cli.stores.typed import Count, as_type
from dalle_cli.training.schedules import Plateau, learning_rate
from dalle_cli.training.validation import BestValidation

Stage = DvaeSettings | PriorSettings | ClipSettings
"""A stage's settings in the recipe."""
EMA_WARMUP = 10
"""Constant of the EMA's warm-up: after t updates its decay is at most (1 + t) / (EMA_WARMUP + t)."""


@dataclass(frozen=True)
class _Schedules:
    """The schedules in a checkpoint's trainer state."""

    plateau: dict[str, int | float]
    best: BestValidation = field(default_factory=BestValidation)
    rounds: list[tuple[Count, Count]] = field(default_factory=list)


class TrainingState:
    """The weights, EMA weights and moments of the rows that this rank holds, and the plateau schedule.

    If the engine scales gradients, the model trains in 16 bit with ``precision.adam``. EMA weights are always in 32
    bit. If they are not updated after every update, they are in the host's memory, as in the paper (appendix B.2).

    Args:
        engine: the model, whole or sharded.
        settings: the stage's settings.
        decayed: names of the parameters that weight decay applies to.
        seed: the seed of stochastic rounding in 16-bit training.
    """

    def __init__(self, engine: Engine, settings: Stage, decayed: set[str], seed: int = 0) -> None:
        self.engine, self.settings = engine, settings
        self.names, self.parameters = list(engine.parameters), list(engine.parameters.values())
        self.ema = [self._empty_ema(p).copy_(p.detach()) for p in self.parameters]
        self.optimizer = _build_optimizer(
            engine.parameters, decayed, settings.adam, None if engine.scaling is None else seed
        )
        self.plateau = Plateau(settings.learning_rate)
        self.best = BestValidation()
        self.skipped_updates = 0
        """Number of updates that skipped a parameter because of a non-finite gradient."""
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

    def update(self, rate: float) -> dict[str, Tensor]:
        """Clip the gradients and make one optimizer step with learning rate ``rate``; return values to log."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.engine.scaling is not None:
            return self._scaled_update()
        clip_norm = self.settings.adam.clip_norm
        norm = nn.utils.get_total_norm([p.grad for p in self.engine.owned_parameters() if p.grad is not None])
        if self.engine.sharded:
            norm = self.engine.sum_over_shards(norm.square()).sqrt()
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        self.optimizer.step()
        return {"grad_norm": norm}

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
        for averaged, parameter in zip(self.ema, self.parameters, strict=True):
            # One by one to save memory, because 16-bit weights are copied to 32 bit.
            averaged.lerp_(parameter.detach().to(averaged.device).float(), share)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Give the model its EMA weights inside the block; a copy of its own is on the device of the EMA weights."""
        parameters = [p.detach() for p in self.parameters]
        raw = [p.to(averaged.device, copy=True) for p, averaged in zip(parameters, self.ema, strict=True)]
        self._set_weights(self.ema)
        try:
            yield
        finally:
            self._set_weights(raw)

    def checkpoint(self, step: int) -> CheckpointContent:
        """Return the whole state after ``step`` updates."""
        raw = {name: tensor.detach() for name, tensor in self.engine.model.state_dict().items()}
        return CheckpointContent(
            weights={"raw": raw, "ema": {**raw, **dict(zip(self.names, self.ema, strict=True))}},
            optimizer=self._moments(self.names),
            trainer_state=self._trainer_state(step),
        )

    def checkpoint_shards(self, step: int) -> CheckpointShards:
        """Return the state that this rank saves after ``step`` updates."""
        names = self.engine.names_to_save()
        raw = dict(zip(self.names, self.parameters, strict=True))
        ema = dict(zip(self.names, self.ema, strict=True))
        return CheckpointShards(
            weights={"raw": self._parts(raw, names), "ema": self._parts(ema, names)},
            optimizer=self._parts(self._moments(names)),
            trainer_state=self._trainer_state(step),
            own=self.engine.rank_state(),
        )

    def load_schedules(self, checkpoint: Checkpoint) -> None:
        """Restore the plateau schedule, the best validation and the rounds of ``checkpoint``, but no tensors."""
        saved = as_type(_Schedules, checkpoint.trainer_state(), checkpoint.path / STATE)
        self.plateau = Plateau(self.settings.learning_rate, saved.plateau)
        self.best, self.rounds = saved.best, saved.rounds

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the tensors of ``checkpoint``, which was checked, however many ranks saved it."""
        engine = self.engine
        if engine.sharded:
            self._read(checkpoint.files_of("raw"), self.parameters)
        else:
            engine.model.load_state_dict(checkpoint.files_of("raw").all())
        self._read(checkpoint.files_of("ema"), self.ema)
        moments, state = checkpoint.moments(), checkpoint.trainer_state()
        saved: dict[str, list[str]] = {}
        for key in moments.names():
            saved.setdefault(key.partition(".")[2], []).append(key)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in saved:
                own = {key.partition(".")[0]: moments.read(key, engine.rows(name)) for key in saved[name]}
                self.optimizer.state[parameter] = {key: _laid_out_like(parameter, value) for key, value in own.items()}
        engine.load_rank_state(checkpoint.own_state(engine.group.rank, engine.group.size))
        engine.release_gathered()
        if engine.scaling is not None:
            engine.scaling.scales.load_state_dict(state["scales"])
            self.skipped_updates = state.get("skipped_updates", 0)
            engine.scaling.assign_scales()

    def _scaled_update(self) -> dict[str, Tensor]:
        """Make an optimizer step from scaled gradients and adjust the scales."""
        scaling = cast(GradientScaling, self.engine.scaling)
        squares = self.engine.sum_over_shards(scaling.squares(scaling.gradients(self.engine.owned_parameters())))
        logged = scaling.step(cast(Adam16, self.optimizer), self.settings.adam.clip_norm, squares)
        self.skipped_updates += logged["skipped"] > 0
        logged["skipped_updates"] = self.skipped_updates
        return {name: torch.tensor(value) for name, value in logged.items()}

    def _moments(self, names: list[str]) -> dict[str, Tensor]:
        """Return the optimizer's tensors of the parameters ``names``, as ``exp_avg.NAME`` and so on."""
        found = {}
        for name in names:
            for key, value in self.optimizer.state.get(self.engine.parameters[name], {}).items():
                found[f"{key}.{name}"] = value
        return found

    def _trainer_state(self, step: int) -> dict[str, Any]:
        scales = {}
        if self.engine.scaling is not None:
            scales = {"scales": self.engine.scaling.scales.state_dict(), "skipped_updates": self.skipped_updates}
        rounds = {"rounds": self.rounds} if self.rounds else {}
        return {"step": step, "plateau": self.plateau.state, "best": asdict(self.best), **rounds, **scales}

    def _parts(self, tensors: Mapping[str, Tensor], keys: Iterable[str] | None = None) -> dict[str, Part]:
        """Return ``tensors`` (of ``keys``: NAME or PREFIX.NAME) with their places in the whole tensors."""
        parts = {}
        for key in tensors if keys is None else keys:
            value = tensors[key].detach()
            name = key if key in self.engine.parameters else key.partition(".")[2]
            first, shape = self.engine.rows(name).start or 0, tuple(self.engine.shape(name))
            parts[key] = Part(value, first, shape) if value.dim() else Part(value)
        return parts

    def _empty_ema(self, parameter: Tensor) -> Tensor:
        device = parameter.device if self.settings.training.ema_every == 1 else torch.device("cpu")
        return torch.empty_like(parameter, dtype=torch.float32, device=device)

    @torch.no_grad()
    def _read(self, files: TensorFiles, targets: Sequence[Tensor]) -> None:
        for name, target in zip(self.names, targets, strict=True):
            target.copy_(files.read(name, self.engine.rows(name)))

    @torch.no_grad()
    def _set_weights(self, values: list[Tensor]) -> None:
        self.engine.release_gathered()
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def _build_optimizer(
    named: dict[str, nn.Parameter], decayed: set[str], adam: Adam, seed: int | None
) -> torch.optim.Optimizer:
    """Return AdamW; with a ``seed``, ``Adam16`` with 16-bit moments of the decayed parameters."""
    matrices = {"params": [p for name, p in named.items() if name in decayed], "weight_decay": adam.weight_decay}
    others = {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0}
    betas = (adam.beta1, adam.beta2)
    if seed is not None:
        return Adam16([{**matrices, "packed": True}, others], lr=0.0, betas=betas, eps=adam.eps, seed=seed)
    groups = [group for group in (matrices, others) if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=adam.eps, fused=True)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the device and strides of ``parameter``, such as channels last, as the optimizer does."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
