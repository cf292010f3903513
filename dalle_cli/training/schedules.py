"""Schedules: values that change with the number of updates done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dalle_cli.config.schema import LearningRate, Ramp


def ramp(settings: Ramp, step: int) -> float:
    """Return the value after ``step`` updates."""
    if settings.updates == 0 or step >= settings.updates:
        return settings.end
    done = step / settings.updates
    if settings.shape == "exponential":
        return settings.start * math.pow(settings.end / settings.start, done)
    if settings.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return settings.start + (settings.end - settings.start) * done


def learning_rate(settings: LearningRate, step: int, updates: int, halvings: int = 0) -> float:
    """Return the learning rate of the update that follows ``step`` of the run's ``updates``.

    ``halvings`` is how often the plateau schedule has halved it.
    """
    if step < settings.warmup_updates:
        return settings.peak * (step + 1) / settings.warmup_updates
    if settings.schedule == "cosine":
        end = settings.decay_updates or updates
        done = min((step - settings.warmup_updates) / max(end - settings.warmup_updates, 1), 1.0)
        return settings.final + (settings.peak - settings.final) * (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "plateau":
        return max(settings.peak * 0.5**halvings, settings.final)
    return settings.peak


@dataclass
class Plateau:
    """Counts halvings of the learning rate, one each time the watched loss has stopped improving."""

    settings: LearningRate
    state: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = {"best": math.inf, "stale": 0, "halvings": 0, "sum": 0.0, "updates": 0, **self.state}

    @property
    def halvings(self) -> int:
        """Number of halvings so far."""
        return int(self.state["halvings"])

    def add_training_loss(self, loss: float) -> None:
        """Add the training loss of an update to the mean that ``observe_training`` takes."""
        self.state["sum"] += loss
        self.state["updates"] += 1

    def observe_training(self) -> None:
        """Record the mean training loss of the updates since the last call, if there were any."""
        if self.state["updates"]:
            self.observe(self.state["sum"] / self.state["updates"])
            self.state["sum"], self.state["updates"] = 0.0, 0

    def observe(self, loss: float) -> None:
        """Record a watched loss."""
        best, most = self.state["best"], self.settings.plateau_halvings
        if loss < best - self.settings.plateau_threshold * abs(best) or math.isinf(best):
            self.state["best"], self.state["stale"] = loss, 0
            return
        self.state["stale"] += 1
        if self.state["stale"] >= self.settings.plateau_validations:
            self.state["stale"] = 0
            self.state["halvings"] += most is None or self.state["halvings"] < most
