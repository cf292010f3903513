"""What an update changes: weights, their average, the optimizer's moments, the plateau. A checkpoint keeps it all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle_cli.config.schema import Adam, LearningRate
from dalle_cli.distributed.engine import Engine, Replicated
from dalle_cli.distributed.group import ALONE
from dalle_cli.precision.adam import Adam16
from dalle_cli.precision.gradient_scaling import GradientScaling
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.tensor_files import Part, TensorFiles
from dalle_cli.training.schedules import Plateau

EMA_WARMUP = 10
"""The EMA's decay after t updates is min(decay, (1 + t) / (EMA_WARMUP + t)), so that early weights do not linger."""


class TrainingState:
    """The model with all that training adds to it, at its beginning; ``decayed`` names what weight decay touches.

    With a ``scaling`` the model is trained in 16 bit, by ``precision.adam`` with rounding noise from ``seed``. The
    average of the weights is in 32 bit always. Weights, average and moments are of this process's parts of the
    parameters, as the ``engine`` deals them out; by default it holds the whole model, alone. With ``ema_every`` above 1
    the average is in the host's memory (as in the paper, appendix E.2), as what is touched so rarely may be.
    """

    def __init__(
        self,
        model: nn.Module,
        decayed: set[str],
        adam: Adam,
        rate: LearningRate,
        scaling: GradientScaling | None = None,
        seed: int = 0,
        engine: Engine | None = None,
        ema_every: int = 1,
    ) -> None:
        self.model, self.ema_every = model, ema_every
        self.engine = Replicated(model, ALONE) if engine is None else engine
        named = self.engine.parameters
        self.names, self.parameters = list(named), list(named.values())
        self.ema = [self._beside(p).copy_(p.detach()) for p in self.parameters]
        self.scaling = scaling
        self.optimizer = _build_optimizer(named, decayed, adam, None if scaling is None else seed)
        self.plateau = Plateau(rate)
        self.skipped_updates = 0
        """Updates in which something was not updated for a non-finite gradient."""

    def update(self, rate: float, clip_norm: float | None) -> dict[str, Tensor]:
        """One step of size ``rate`` from the gradients at hand, their norm clipped. Returns what is to be logged."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaling is not None:
            held = self.scaling.held(self.engine.counted())
            squares = self.engine.sum_over_parts(self.scaling.squares(held))
            logged = self.scaling.step(cast(Adam16, self.optimizer), clip_norm, squares)
            self.skipped_updates += logged["skipped"] > 0
            logged["skipped_updates"] = self.skipped_updates
            return {name: torch.tensor(value) for name, value in logged.items()}
        norm = nn.utils.get_total_norm([p.grad for p in self.engine.counted() if p.grad is not None])
        if not self.engine.whole:
            norm = self.engine.sum_over_parts(norm.square()).sqrt()
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        self.optimizer.step()
        return {"grad_norm": norm}

    @torch.no_grad()
    def average(self, decay: float, step: int) -> None:
        """Take the weights into their moving average, after the update that follows ``step`` updates.

        Of ``ema_every`` updates the last one does, by the decays of all.
        """
        done = step + 1
        if done % self.ema_every:
            return
        decays = (min(decay, (1 + t) / (EMA_WARMUP + t)) for t in range(done - self.ema_every, done))
        share = 1 - math.prod(decays)
        for averaged, parameter in zip(self.ema, self.parameters, strict=True):
            # One by one: 16-bit weights are copied for it.
            averaged.lerp_(parameter.detach().to(averaged.device).float(), share)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block, the model's weights are the averaged ones; theirs are where the average is otherwise."""
        parameters = [p.detach() for p in self.parameters]
        kept = [p.to(averaged.device, copy=True) for p, averaged in zip(parameters, self.ema, strict=True)]
        self._set(self.ema)
        try:
            yield
        finally:
            self._set(kept)

    def contents(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds, as ``save_checkpoint`` takes it."""
        raw = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        return {
            "weights": {"raw": raw, "ema": {**raw, **dict(zip(self.names, self.ema, strict=True))}},
            "optimizer": self._moments(self.names),
            "trainer_state": self._trainer_state(step),
        }

    def parts(self, step: int) -> dict[str, Any]:
        """What this process adds to a checkpoint that several write, as ``save_parts`` takes it."""
        written = self.engine.writes()
        raw = dict(zip(self.names, self.parameters, strict=True))
        ema = dict(zip(self.names, self.ema, strict=True))
        return {
            "weights": {"raw": self._parts(raw, written), "ema": self._parts(ema, written)},
            "optimizer": self._parts(self._moments(written)),
            "own": self.engine.own_state(),
            "trainer_state": self._trainer_state(step),
        }

    def _moments(self, names: list[str]) -> dict[str, Tensor]:
        """The optimizer's tensors of the parameters of ``names``, as ``exp_avg.NAME`` and so on."""
        found = {}
        for name in names:
            for key, value in self.optimizer.state.get(self.engine.parameters[name], {}).items():
                found[f"{key}.{name}"] = value
        return found

    def _trainer_state(self, step: int) -> dict[str, Any]:
        scales = {}
        if self.scaling is not None:
            scales = {"scales": self.scaling.scales.state_dict(), "skipped_updates": self.skipped_updates}
        return {"step": step, "plateau": self.plateau.state, **scales}

    def _parts(self, tensors: Mapping[str, Tensor], keys: Iterable[str] | None = None) -> dict[str, Part]:
        """``tensors`` (those of ``keys``) with the rows that they are; a key is a parameter's name, or ends with it."""
        parts = {}
        for key in tensors if keys is None else keys:
            value = tensors[key].detach()
            name = key if key in self.engine.parameters else key.partition(".")[2]
            first, shape = self.engine.rows(name).start or 0, tuple(self.engine.shape(name))
            parts[key] = Part(value, first, shape) if value.dim() else Part(value)
        return parts

    def load(self, found: Checkpoint) -> None:
        """Go back to what ``found`` holds, whatever processes wrote it."""
        engine = self.engine
        found.check(engine.group.rank, engine.group.size)
        if engine.whole:
            self.model.load_state_dict(found.files_of("raw").all())
        else:
            self._read(found.files_of("raw"), self.parameters)
        self._read(found.files_of("ema"), self.ema)
        moments, state = found.moments(), found.trainer_state()
        kept: dict[str, list[str]] = {}
        for key in moments.names():
            kept.setdefault(key.partition(".")[2], []).append(key)
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if name in kept:
                own = {key.partition(".")[0]: moments.read(key, engine.rows(name)) for key in kept[name]}
                self.optimizer.state[parameter] = {key: _laid_out_like(parameter, value) for key, value in own.items()}
        engine.load_own_state(found.own_state(engine.group.rank, engine.group.size))
        engine.settle()
        self.plateau.state = dict(state["plateau"])
        if self.scaling is not None:
            self.scaling.scales.load_state_dict(state["scales"])
            self.skipped_updates = state.get("skipped_updates", 0)
            self.scaling.hand_out()

    def _beside(self, parameter: Tensor) -> Tensor:
        """Room for the average of ``parameter``."""
        place = parameter.device if self.ema_every == 1 else torch.device("cpu")
        return torch.empty_like(parameter, dtype=torch.float32, device=place)

    @torch.no_grad()
    def _read(self, files: TensorFiles, targets: Sequence[Tensor]) -> None:
        for name, target in zip(self.names, targets, strict=True):
            target.copy_(files.read(name, self.engine.rows(name)))

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        self.engine.settle()
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def _build_optimizer(
    named: dict[str, nn.Parameter], decayed: set[str], adam: Adam, seed: int | None
) -> torch.optim.Optimizer:
    """With a ``seed`` the one whose moments of decayed parameters take 16 bit."""
    matrices = {"params": [p for name, p in named.items() if name in decayed], "weight_decay": adam.weight_decay}
    others = {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0}
    betas = (adam.beta1, adam.beta2)
    if seed is not None:
        return Adam16([{**matrices, "packed": True}, others], lr=0.0, betas=betas, eps=adam.eps, seed=seed)
    groups = [group for group in (matrices, others) if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=adam.eps, fused=True)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` on the device of ``parameter`` and with its strides (channels last, for instance), as the optimizer
    made it.
    """
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
