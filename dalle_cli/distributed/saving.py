"""What a checkpoint of the prior's training takes: bytes, and the share of the time, as training waits for it."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_cli.distributed.memory import Counts, Machines, held
from dalle_cli.recipes.schema import PriorSettings


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
