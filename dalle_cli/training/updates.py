"""Updates by AdamW of parameters whose gradients an engine left in ``grad``, in 32 bit or, with scales, in 16 bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dalle_cli.config.schema import Adam
from dalle_cli.distributed.engine import TorchEngine
from dalle_cli.errors import UserError
from dalle_cli.precision.adam import Adam16, adam_groups
from dalle_cli.precision.formats import MOMENTS
from dalle_cli.transfers import OnItsWay

SMALLEST_SCALE = 2.0**-24
"""Scale of a loss below which no float16 number is left that another halving could help."""


class AdamUpdates:
    """The ``Optimizer`` of an engine that brings none of its own.

    If the engine scales gradients, parameters train in 16 bit with ``precision.adam``, else in 32 bit with torch's
    AdamW; an engine that scales its loss skips updates with a gradient that is not finite. That is decided on the
    gradients' device, for which the host does not wait.

    Args:
        engine: the parameters, whole or sharded.
        decayed: names of the parameters that weight decay applies to.
        adam: the recipe's settings.
        seed: the seed of stochastic rounding in 16-bit training.
    """

    def __init__(self, engine: TorchEngine, decayed: set[str], adam: Adam, seed: int = 0) -> None:
        self.engine, self.clip_norm = engine, adam.clip_norm
        self.adam = _build_adam(engine.parameters, decayed, adam, None if engine.scaling is None else seed)
        self.skipped_updates: Tensor | int = 0
        """Number of updates that skipped a parameter because of a non-finite gradient, a scalar on their device."""
        self._loss_scale: OnItsWay | None = None
        """The scale of the loss after the newest update."""

    def zero_grad(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def step(self, rate: float) -> dict[str, Tensor]:
        for group in self.adam.param_groups:
            group["lr"] = rate
        engine = self.engine
        if engine.scaling is not None:
            squares = engine.sum_over_shards(
                engine.scaling.squares(engine.scaling.gradients(engine.owned_parameters()))
            )
            logged = engine.scaling.step(cast(Adam16, self.adam), self.clip_norm, squares)
            return self._with_count({name: value.float() for name, value in logged.items()})
        if engine.loss_scaler is not None:
            if self._loss_scale is not None and self._loss_scale.read()[0] < SMALLEST_SCALE:
                raise UserError(
                    "dvae.precision: gradients are not finite in float16 however the loss is scaled; set bf16 or fp32"
                )
            engine.loss_scaler.unscale_(self.adam)  # and note if a gradient is not finite, which skips the update
        norm = nn.utils.get_total_norm([p.grad for p in engine.owned_parameters() if p.grad is not None])
        if engine.sharded:
            norm = engine.sum_over_shards(norm.square()).sqrt()
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(engine.parameters.values(), self.clip_norm, norm)
        if engine.loss_scaler is None:
            self.adam.step()
            return {"grad_norm": norm}
        one = torch.ones_like(norm)
        scale = engine.loss_scaler.scale(one)  # get_scale() would wait for it
        engine.loss_scaler.step(self.adam)
        engine.loss_scaler.update()
        next_scale = engine.loss_scaler.scale(one)
        self._loss_scale = OnItsWay.of(next_scale)
        skipped = next_scale < scale
        norm = torch.where(skipped, 0.0, norm)
        return self._with_count({"grad_norm": norm, "skipped": skipped.float(), "log2_scale": scale.log2()})

    def _with_count(self, logged: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the update if it skipped a parameter, and return ``logged`` with the count."""
        self.skipped_updates = self.skipped_updates + (logged["skipped"] > 0)
        return {**logged, "skipped_updates": self.skipped_updates}

    def moments(self, name: str) -> dict[str, Tensor]:
        if isinstance(self.adam, Adam16):
            self.adam.settle()
        return dict(self.adam.state.get(self.engine.parameters[name], {}))

    def load_moments(self, moments: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        packed = {p for group in self.adam.param_groups if group.get("packed") for p in group["params"]}
        for name, values in moments:
            parameter = self.engine.parameters[name]
            self.adam.state[parameter] = {
                key: _laid_out_like(parameter, _in_type(value, key, parameter in packed))
                for key, value in values.items()
            }

    def trainer_state(self) -> dict[str, Any]:
        if self.engine.loss_scaler is not None:
            return {"loss_scale": self.engine.loss_scaler.state_dict(), "skipped_updates": int(self.skipped_updates)}
        if self.engine.scaling is None:
            return {}
        return {"scales": self.engine.scaling.scales.state_dict(), "skipped_updates": int(self.skipped_updates)}

    def load_trainer_state(self, state: Mapping[str, Any]) -> None:
        if self.engine.scaling is None and self.engine.loss_scaler is None:
            return
        self.skipped_updates = state.get("skipped_updates", 0)
        if self.engine.loss_scaler is not None:
            if "loss_scale" in state:  # another precision trains without it
                self.engine.loss_scaler.load_state_dict(state["loss_scale"])
            return
        assert self.engine.scaling is not None
        if "scales" in state:  # another engine trains without them
            self.engine.scaling.scales.load_state_dict(state["scales"])
        self.engine.scaling.assign_scales()


def _build_adam(
    named: Mapping[str, nn.Parameter], decayed: set[str], adam: Adam, seed: int | None
) -> torch.optim.Optimizer:
    """Return AdamW; with a ``seed``, ``Adam16`` with 16-bit moments of the decayed parameters."""
    matrices, others = adam_groups(named, decayed, adam)
    betas = (adam.beta1, adam.beta2)
    if seed is not None:
        return Adam16([{**matrices, "packed": True}, others], lr=0.0, betas=betas, eps=adam.eps, seed=seed)
    groups = [group for group in (matrices, others) if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=adam.eps, fused=True)


def _in_type(value: Tensor, key: str, packed: bool) -> Tensor:
    """Return a moment in the type that the optimizer holds it in; another engine may have saved it in the other one."""
    if key not in MOMENTS or packed == (value.dtype == torch.uint16):
        return value
    return MOMENTS[key].encode(value) if packed else MOMENTS[key].decode(value)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the device and strides of ``parameter``, such as channels last, as the optimizer does."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
