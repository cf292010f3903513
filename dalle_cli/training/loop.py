"""The one training loop: the dVAE, the prior and CLIP differ only in their ``Task``.

Nothing in an update depends on what ran before it except the weights and moments: batches, noise and schedules are
functions of (seed, step). So a killed run that starts again at its newest checkpoint ends with the same bytes.

Several processes run the same loop, each on its part of every batch; see ``distributed/group.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle_cli.config.load import dump_recipe
from dalle_cli.config.schema import Adam, LearningRate, Recipe, Training
from dalle_cli.distributed.device import explain_out_of_memory, limit_threads
from dalle_cli.distributed.engine import Engine, Replicated
from dalle_cli.distributed.group import Group
from dalle_cli.errors import RESUMABLE, Stopped, UserError
from dalle_cli.precision.gradient_scaling import GradientScaling
from dalle_cli.progress import Progress, log, progress
from dalle_cli.stores.checkpoint import (
    Checkpoint,
    Kind,
    open_checkpoint,
    prune,
    save_checkpoint,
    save_parts,
    step_folder,
    steps_in,
)
from dalle_cli.stores.files import explain_os_errors
from dalle_cli.training.journal import Journal, WeightsAndBiases, require_wandb
from dalle_cli.training.resume import refuse_other_settings
from dalle_cli.training.schedules import learning_rate
from dalle_cli.training.signals import StopRequest
from dalle_cli.training.state import TrainingState
from dalle_cli.training.throughput import Pace, SampleWork, peak_tflops


class Task(Protocol):
    """What is being trained."""

    kind: Kind
    group: Group
    less_memory: str
    """What to set where a GPU's memory is full."""

    @property
    def model(self) -> nn.Module:
        """What is trained, on the group's device."""

    def work(self) -> SampleWork:
        """What a sample takes."""

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """This process's part of the batch of each update from ``start`` up to ``stop``."""

    def micro_batches(self, batch: Any, size: int | None) -> list[tuple[Any, float]]:
        """``batch`` in parts of ``size`` samples, each with its share of the whole batch of all processes."""

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Scalars to log; ``"loss"`` is minimised."""

    def validate(self, step: int) -> dict[str, float]:
        """Scalars of ``model`` as it is on held-out samples, none where nothing is held out.

        ``"loss"`` steers the plateau schedule.
        """

    def exhibits(self) -> dict[str, Tensor]:
        """Pictures (3, H, W) uint8, by name, that show what ``model`` as it is can do; after ``validate``."""

    def decayed(self) -> set[str]:
        """Names of the parameters that weight decay applies to."""

    def after_update(self) -> None:
        """Called once an update is done, for constraints on the weights."""


@dataclass
class Run:
    """A training run and the folder it lives in."""

    task: Task
    recipe: Recipe
    out: Path
    training: Training
    adam: Adam
    learning_rate: LearningRate
    stage_keys: tuple[str, ...]
    """Blocks of the recipe that must be the same when a run goes on."""
    belongs: dict[str, str] = field(default_factory=dict)
    unit: str = "updates"
    scaling: GradientScaling | None = None
    """Of the gradients in 16-bit training."""
    engine: Engine | None = None
    """Who holds which part of the model; by default every process holds it whole."""
    counters: dict[str, Callable[[], int]] = field(default_factory=dict)
    """What only grows, such as the bytes sent between machines; the journal has an update's share, by name."""
    stop: StopRequest = field(default_factory=StopRequest, init=False)

    def train(self) -> Checkpoint:
        """Train to the recipe's last update, from the newest checkpoint in ``out`` if there is one.

        Raises:
            UserError: ``out`` holds a run of other settings or inputs, the loss is no longer finite, the disk or the
                GPU's memory is full, there are more processes than samples in a batch, or one of them is lost.
            Stopped: a signal came to one of the processes; all have left at the same update, once it was saved.
        """
        task, group = self.task, self.task.group
        require_wandb(self.recipe.monitoring.wandb)
        if group.size > self.training.batch_size:
            raise UserError(
                f"{task.kind}.training.batch_size: {self.training.batch_size} samples cannot be shared among "
                f"{group.size} processes; raise it, or start fewer"
            )
        engine = self.engine or Replicated(task.model, group)
        if not engine.whole and self.training.batch_size % group.size:
            raise UserError(
                f"{task.kind}.training.batch_size: {self.training.batch_size} samples are no multiple of the "
                f"{group.size} processes that share the model; set a multiple"
            )
        with explain_os_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        limit_threads(self.recipe)
        with explain_out_of_memory(self.out, task.less_memory), self.stop:
            state = TrainingState(
                task.model,
                task.decayed(),
                self.adam,
                self.learning_rate,
                self.scaling,
                self.recipe.seed,
                engine,
                self.training.ema_every,
            )
            resumed = self._resume(state)
            start, metrics = (resumed.step, dict(resumed.metrics)) if resumed else (0, {})
            group.require_same("recipe or checkpoint", f"{start} {dump_recipe(self.recipe)}")
            if start < self.training.updates:
                with group.explained():
                    self._train(state, start, metrics)
        # Nobody leaves before the leader has saved: launchers end the others once one has left.
        group.wait()
        if self.stop.leaves:
            raise Stopped
        return open_checkpoint(self.out, task.kind)

    def _train(self, state: TrainingState, start: int, validated: dict[str, float]) -> None:
        task, group, training, note = self.task, self.task.group, self.training, ""
        steps = range(start, training.updates)
        with (
            Journal(self.out, start, writes=group.leads, more=self._boards()) as journal,
            progress(f"train-{task.kind}", training.updates, self.unit, start) as bar,
        ):
            pace = self._pace()
            counters = {"bytes_communicated": lambda: group.traffic.bytes, **self.counters}
            for step, batch in zip(steps, task.batches(steps.start, steps.stop), strict=True):
                counted = {name: count() for name, count in counters.items()}
                rate = learning_rate(self.learning_rate, step, training.updates, state.plateau.halvings)
                values = self._update(state, batch, step, rate)
                state.average(training.ema_decay, step)
                done = step + 1
                pace.advance()
                if group.leads and (done == 1 or self._due(training.log_every, done)):
                    scalars = {name: float(value) for name, value in values.items()}
                    sent = {name: count() - counted[name] for name, count in counters.items()}
                    journal.training(done, rate, {**scalars, **sent, **pace.measure()})
                    note = f"loss {float(values['loss']):.4f}"
                began = time.monotonic()
                if self._due(training.validate_every, done):
                    if group.leads or not state.engine.whole:
                        validated = self._validate(state, done, journal, bar)
                    loss = group.from_leader(validated.get("raw_loss", math.nan))
                    if not math.isnan(loss):
                        state.plateau.observe(loss)
                self.stop.leaves = group.any(self.stop.signal is not None) and done < training.updates
                if self.stop.leaves or self._due(training.save_every, done):
                    journal.flush()
                    self._save(state, done, validated)
                pace.leave_out(time.monotonic() - began)
                bar.advance(1, note)
                if self.stop.leaves:
                    bar.say(
                        f"train-{task.kind}: {self.stop.signal or 'a signal to another process'}: saved "
                        f"{step_folder(self.out, done)} of {training.updates} {self.unit} and leaves with exit code "
                        f"{RESUMABLE}; the same command goes on from there"
                    )
                    break

    def _pace(self) -> Pace:
        group, work = self.task.group, self.task.work()
        if not group.leads:
            return Pace(work, self.training.batch_size, group.size, math.inf)
        peak, source = peak_tflops(self.recipe.monitoring.peak_tflops, work.dtype, group.device)
        log(
            f"train-{self.task.kind}: {work.flops / 1e9:.3g} GFLOP a sample; mfu is the share of {peak:.3g} TFLOP/s a "
            f"device, {source}"
        )
        return Pace(work, self.training.batch_size, group.size, peak)

    def _boards(self) -> list[Callable[[], WeightsAndBiases]]:
        recipe, kind = self.recipe, self.task.kind
        if (project := recipe.monitoring.wandb) is None:
            return []
        config = {"stage": kind, **recipe.model_dump(mode="json")}
        return [lambda: WeightsAndBiases(self.out, project, f"{recipe.name} {kind}", config)]

    def _due(self, every: int, done: int) -> bool:
        return done % every == 0 or done == self.training.updates

    def _update(self, state: TrainingState, batch: Any, step: int, rate: float) -> dict[str, Tensor]:
        task, group = self.task, self.task.group
        task.model.train()
        state.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        parts = task.micro_batches(batch, self.training.micro_batch)
        for i, (part, share) in enumerate(parts):
            state.engine.micro_batch(last=i == len(parts) - 1)
            values = task.loss(part, step)
            (values["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach() * share
        totals = group.sum_scalars(totals)
        if not math.isfinite(float(totals["loss"])):
            raise UserError(
                f"{self.out}: the loss is {float(totals['loss'])} at update {step + 1}; "
                f"lower {task.kind}.learning_rate.peak and start again from the last checkpoint"
            )
        state.engine.collect_gradients(step, self.scaling)
        totals |= state.update(rate, self.adam.clip_norm)
        task.after_update()
        state.engine.settle()
        return totals

    def _validate(self, state: TrainingState, step: int, journal: Journal, bar: Progress) -> dict[str, float]:
        """Scalars under the averaged weights, and ``raw_`` ones under the raw; none where nothing is held out."""
        self.task.model.eval()
        state.optimizer.zero_grad(set_to_none=True)  # for the room they take
        with torch.no_grad():
            raw = self.task.validate(step)
            if not raw:
                return {}
            with state.averaged():
                values, pictures = self.task.validate(step), self.task.exhibits()
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        bar.say(f"train-{self.task.kind}: validation after {step} {self.unit}: {text}")
        validated = {**values, **{f"raw_{name}": value for name, value in raw.items()}}
        journal.validation(step, validated, pictures)
        return validated

    def _save(self, state: TrainingState, step: int, metrics: dict[str, float]) -> None:
        facts: dict[str, Any] = {
            "kind": self.task.kind,
            "step": step,
            "recipe": self.recipe,
            "belongs": self.belongs,
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        }
        group = self.task.group
        if not state.engine.whole:
            save_parts(step_folder(self.out, step), group, **facts, **state.parts(step))
        elif group.leads:
            save_checkpoint(step_folder(self.out, step), **facts, **state.contents(step))
        if group.leads:
            prune(self.out, self.training.keep)

    def _resume(self, state: TrainingState) -> Checkpoint | None:
        if not steps_in(self.out):
            return None
        found = open_checkpoint(self.out, self.task.kind)
        refuse_other_settings(self.out, found, self.recipe, self.stage_keys, self.belongs)
        if found.step >= self.training.updates:
            log(f"{self.out}: already trained, {found.step} of {self.training.updates} {self.unit}")
        else:
            state.load(found)
            log(f"{self.out}: goes on from {found.path.name}")
        return found
