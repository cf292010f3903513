"""The engine: how a model's parameters are spread over ranks during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle_cli.distributed.group import ALONE, Group
from dalle_cli.precision.gradient_scaling import GradientScaling


class Engine(Protocol):
    """Holds a model's parameters on all ranks. All ranks call the same methods in the same order."""

    group: Group
    model: nn.Module
    sharded: bool
    """True if a rank holds only some rows of the parameters, so that no rank can validate or save alone."""
    parameters: dict[str, nn.Parameter]
    """The rows that this rank holds of each trainable parameter, by the parameter's name."""
    scaling: GradientScaling | None
    """Scaling of the gradients in 16-bit training, None in 32 bit."""

    def begin_micro_batch(self, last: bool) -> None:
        """Prepare for a micro-batch's forward pass; ``last`` marks the last micro-batch of the update."""

    def collect_gradients(self, update: int) -> None:
        """Sum each parameter's gradient over all ranks, after the last backward pass of ``update`` (from 0)."""

    def owned_parameters(self) -> list[nn.Parameter]:
        """Return the parameters this rank contributes to global norms; ``sum_over_shards`` counts each row once."""

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over the ranks that hold the model together."""

    def release_gathered(self) -> None:
        """Drop gathered copies of the parameters; call it after changing parameters, and before if the model ran."""

    def rows(self, name: str) -> slice:
        """Return which rows of the parameter ``name`` this rank holds."""

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the whole parameter ``name``."""

    def names_to_save(self) -> list[str]:
        """Return the parameters whose rows this rank saves; over all ranks, each row is saved once.

        Raises:
            UserError: ranks that should hold the same weights do not.
        """

    def rank_state(self) -> dict[str, Tensor]:
        """Return the state besides the parameters that this rank alone needs to resume."""

    def load_rank_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Restore what ``rank_state`` returned; None if the checkpoint is from another number of ranks."""

    def traffic(self) -> dict[str, int]:
        """Return the bytes that this rank has sent so far, by the name that the journal gives them."""


class Replicated:
    """An engine where every rank holds the whole model (ZeRO stage 0)."""

    sharded = False

    def __init__(self, model: nn.Module, group: Group = ALONE, scaling: GradientScaling | None = None) -> None:
        self.model, self.group, self.scaling = model, group, scaling
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def begin_micro_batch(self, last: bool) -> None:
        """Do nothing: gradients add up in place."""

    def collect_gradients(self, update: int) -> None:
        self.group.sum_gradients(self.parameters.values())

    def owned_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def sum_over_shards(self, value: Tensor) -> Tensor:
        return value

    def release_gathered(self) -> None:
        """Do nothing: nothing is gathered."""

    def rows(self, name: str) -> slice:
        return slice(None)

    def shape(self, name: str) -> torch.Size:
        return self.parameters[name].shape

    def names_to_save(self) -> list[str]:
        return list(self.parameters) if self.group.leads else []

    def rank_state(self) -> dict[str, Tensor]:
        return {}

    def load_rank_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Do nothing: there is no such state."""

    def traffic(self) -> dict[str, int]:
        return {"bytes_communicated": self.group.traffic.bytes}
