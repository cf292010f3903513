"""What an update changes: weights, their average, the optimizer's moments, the plateau. A checkpoint keeps it all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle_cli.precision.adam import Adam16
from dalle_cli.precision.scaling import GradientScaling
from dalle_cli.recipes.schema import Adam, LearningRate
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.training.schedules import Plateau

EMA_WARMUP = 10
"""The EMA's decay after t updates is min(decay, (1 + t) / (EMA_WARMUP + t)), so that early weights do not linger."""


class TrainingState:
    """The model with all that training adds to it, at its beginning; ``decayed`` names what weight decay touches.

    With a ``scaling`` the model is trained in 16 bit, by ``precision.adam`` with rounding noise from ``seed``. The
    average of the weights is in 32 bit always.
    """

    def __init__(
        self,
        model: nn.Module,
        decayed: set[str],
        adam: Adam,
        rate: LearningRate,
        scaling: GradientScaling | None = None,
        seed: int = 0,
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.names, self.parameters = list(named), list(named.values())
        self.ema = [p.detach().float().clone() for p in self.parameters]
        self.scaling = scaling
        self.optimizer = _build_optimizer(named, decayed, adam, None if scaling is None else seed)
        self.plateau = Plateau(rate)

    def update(self, rate: float, clip_norm: float | None) -> dict[str, Tensor]:
        """One step of size ``rate`` from the gradients at hand, their norm clipped. Returns what is to be logged."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaling is not None:
            logged = self.scaling.step(cast(Adam16, self.optimizer), clip_norm)
            return {name: torch.tensor(value) for name, value in logged.items()}
        found = {}
        if clip_norm is not None:
            found["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        self.optimizer.step()
        return found

    @torch.no_grad()
    def average(self, decay: float, step: int) -> None:
        """Take the weights into their moving average, after the update that follows ``step`` updates."""
        decay = min(decay, (1 + step) / (EMA_WARMUP + step))
        torch._foreach_lerp_(self.ema, [p.detach().float() for p in self.parameters], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block, the model's weights are the averaged ones."""
        kept = [p.detach().clone() for p in self.parameters]
        self._set(self.ema)
        try:
            yield
        finally:
            self._set(kept)

    def contents(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds, as ``save_checkpoint`` takes it."""
        raw = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        moments = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = value
        scales = {} if self.scaling is None else {"scales": self.scaling.scales.state_dict()}
        return {
            "weights": {"raw": raw, "ema": {**raw, **dict(zip(self.names, self.ema, strict=True))}},
            "optimizer": moments,
            "trainer_state": {"step": step, "plateau": self.plateau.state, **scales},
        }

    def load(self, found: Checkpoint) -> None:
        """Go back to what ``found`` holds."""
        self.model.load_state_dict(found.tensors("raw"))
        averaged = found.tensors("ema")
        for name, target in zip(self.names, self.ema, strict=True):
            target.copy_(averaged[name])
        moments, state = found.trainer()
        for name, parameter in self.model.named_parameters():
            keys = {key.partition(".")[0] for key in moments if key.partition(".")[2] == name}
            if keys:
                own = {key: _laid_out_like(parameter, moments[f"{key}.{name}"]) for key in keys}
                self.optimizer.state[parameter] = own
        self.plateau.state = dict(state["plateau"])
        if self.scaling is not None:
            self.scaling.scales.load_state_dict(state["scales"])
            self.scaling.hand_out()

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
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
    made it."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
