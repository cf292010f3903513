"""How long an update of the prior takes and what it costs, from its floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dalle_cli.config.schema import PriorSettings, Recipe
from dalle_cli.planning.memory import Machines, held
from dalle_cli.prior.counts import Counts

HOUR = 3600


@dataclass(frozen=True)
class Assumptions:
    """What no recipe says. By default the paper's GPU, a V100: its data sheet's 125e12 operations a second in 16 bit,
    and a share of them that is a guess until one has measured.
    """

    peak_flops: float = 125e12
    """Of a GPU, a second."""
    share: float = 0.3
    """Of the peak that training reaches."""
    interconnect: float | None = None
    """Bits a second that a machine's link to the others carries, each way."""
    price: float | None = None
    """Of a GPU for an hour."""
    disk: float = 1e9
    """Bytes a second that a machine writes to where checkpoints go: a guess too."""


def assume(recipe: Recipe, peak_tflops: float | None = None, **given: Any) -> Assumptions:
    """``given``, with the peak named, or else the recipe's, or else the default."""
    peak = peak_tflops or recipe.monitoring.peak_tflops
    return Assumptions(**given) if peak is None else Assumptions(1e12 * peak, **given)


@dataclass(frozen=True)
class Saving:
    """Bytes of a checkpoint.

    The processes that hold the model together, or the first one where each holds all, write weights, average and
    moments; every process what PowerSGD keeps for it. All write at once, and go on when the last one has.
    """

    model: int
    own: int
    """Of each process, for itself."""
    machines: Machines
    every: int
    """Updates from one to the next."""

    @property
    def whole(self) -> int:
        return self.model + self.machines.world * self.own

    @property
    def first_machine(self) -> int:
        """Of the machine that writes the most."""
        return self.model + self.machines.gpus * self.own

    def seconds(self, disk: float) -> float:
        """Where a machine writes ``disk`` bytes a second."""
        return self.first_machine / disk

    def share(self, disk: float, step: float) -> float:
        """Of training's time, where an update takes ``step`` seconds."""
        saving = self.seconds(disk)
        return saving / (saving + self.every * step)


def saving(stage: PriorSettings, counts: Counts, machines: Machines) -> Saving:
    """Of the recipe's prior."""
    parts = held(stage, counts, machines)
    kept = ["PowerSGD's errors", *(["PowerSGD's factors"] if stage.powersgd.warm_start else [])]
    return Saving(
        sum(parts[name].whole for name in ("weights", "average", "moments")),
        sum(parts[name].each for name in kept if name in parts),
        machines,
        stage.training.save_every,
    )
