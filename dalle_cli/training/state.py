"""What an update changes: weights, their average, the optimizer's moments, the plateau. A checkpoint keeps it all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dalle_cli.recipes.schema import Adam, LearningRate
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.training.schedules import Plateau

EMA_WARMUP = 10
"""The EMA's decay after t updates is min(decay, (1 + t) / (EMA_WARMUP + t)), so that early weights do not linger."""


class TrainingState:
    """The model with all that training adds to it, at its beginning; ``decayed`` names what weight decay touches."""

    def __init__(self, model: nn.Module, decayed: set[str], adam: Adam, rate: LearningRate) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.names, self.parameters = list(named), list(named.values())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = _build_optimizer(named, decayed, adam)
        self.plateau = Plateau(rate)

    @torch.no_grad()
    def average(self, decay: float, step: int) -> None:
        """Take the weights into their moving average, after the update that follows ``step`` updates."""
        decay = min(decay, (1 + step) / (EMA_WARMUP + step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

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
        return {
            "weights": {"raw": raw, "ema": {**raw, **dict(zip(self.names, self.ema, strict=True))}},
            "optimizer": moments,
            "trainer_state": {"step": step, "plateau": self.plateau.state},
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

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def _build_optimizer(named: dict[str, nn.Parameter], decayed: set[str], adam: Adam) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": adam.weight_decay},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        fused=True,
    )


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` on the device of ``parameter`` and with its strides (channels last, for instance), as the optimizer
    made it."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter).copy_(value)
