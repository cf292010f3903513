"""Who holds which part of the model while it is trained; the loop knows no more of it than ``Engine`` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from dalle_cli.distributed.group import Group
from dalle_cli.precision.gradient_scaling import GradientScaling


class Engine(Protocol):
    """The model's parameters, spread over the processes or not. All processes call the same methods together."""

    group: Group
    parameters: dict[str, nn.Parameter]
    """This process's part of each trainable parameter, by the parameter's name: some of its rows, or all."""
    whole: bool
    """Whether that is all of every parameter, so that one process can validate and save alone."""

    def micro_batch(self, last: bool) -> None:
        """Called before each forward pass of an update; ``last`` is the update's last."""

    def collect_gradients(self, update: int, scaling: GradientScaling | None) -> None:
        """Give each part its gradient, the sum over all processes, after the last backward pass.

        Args:
            update: how many updates went before.
            scaling: what the gradients are scaled by.
        """

    def counted(self) -> list[nn.Parameter]:
        """The parts that this process answers for: over ``sum_over_parts``, each parameter's rows once."""

    def sum_over_parts(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the processes that hold the model together."""

    def settle(self) -> None:
        """To be called when parts were changed, before the model is used, and when it was used before they are."""

    def rows(self, name: str) -> slice:
        """Which rows of the parameter ``name`` this process holds."""

    def shape(self, name: str) -> torch.Size:
        """Of the whole parameter."""

    def writes(self) -> list[str]:
        """Names of the parts that this process saves: over all processes, each parameter's rows once.

        Raises:
            UserError: processes that should hold the same do not.
        """

    def own_state(self) -> dict[str, Tensor]:
        """What training goes on from besides, of this very process."""

    def load_own_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Go back to what ``own_state`` gave; None: of other processes than these, and of no use."""


class Replicated:
    """Every process holds the whole model (ZeRO stage 0)."""

    whole = True

    def __init__(self, model: nn.Module, group: Group) -> None:
        self.group = group
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def micro_batch(self, last: bool) -> None:
        """Gradients add up where they are."""

    def collect_gradients(self, update: int, scaling: GradientScaling | None) -> None:
        self.group.sum_gradients(self.parameters.values())

    def counted(self) -> list[nn.Parameter]:
        return list(self.parameters.values())

    def sum_over_parts(self, value: Tensor) -> Tensor:
        return value

    def settle(self) -> None:
        """The parts are the model."""

    def rows(self, name: str) -> slice:
        return slice(None)

    def shape(self, name: str) -> torch.Size:
        return self.parameters[name].shape

    def writes(self) -> list[str]:
        return list(self.parameters) if self.group.leads else []

    def own_state(self) -> dict[str, Tensor]:
        return {}

    def load_own_state(self, state: Mapping[str, Tensor] | None) -> None:
        """There is none."""
