"""The training loop that the dVAE, the prior and CLIP share; they differ only in their ``Task``.

An update depends only on the saved state and its number: batches and noise are functions of (seed, step). So a killed
run that resumes from its newest checkpoint ends with the same bytes. Several ranks run the same loop, each on its part
of every batch; see ``distributed/group.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dalle_cli.config.load import dump_recipe
from dalle_cli.config.odd_settings import odd_settings
from dalle_cli.config.schema import Recipe
from dalle_cli.data.batch_order import Order
from dalle_cli.data.source import is_unicode
from dalle_cli.data.workers import explain_lost_workers
from dalle_cli.distributed.device import explain_out_of_memory, use_settings
from dalle_cli.distributed.engine import Engine, Replicated
from dalle_cli.distributed.group import Group
from dalle_cli.errors import RESUMABLE, Damaged, Stopped, UserError
from dalle_cli.progress import Progress, log, progress
from dalle_cli.stores.checkpoint import (
    Best,
    Checkpoint,
    CheckpointFacts,
    Kind,
    open_checkpoint,
    prune,
    save_checkpoint,
    save_sharded_checkpoint,
    step_folder,
    steps_in,
)
from dalle_cli.stores.files import explain_os_errors, owned
from dalle_cli.training.idle_cores import IdleCores
from dalle_cli.training.journal import Journal, MetricLogger, WandbLogger, require_wandb
from dalle_cli.training.look_back import LookBack
from dalle_cli.training.resume import check_resumable
from dalle_cli.training.signals import StopRequest
from dalle_cli.training.state import Stage, TrainingState
from dalle_cli.training.throughput import SampleWork, Throughput, peak_tflops, precision_warning
from dalle_cli.training.validation import validation_warnings


class Task(Protocol):
    """A model to train: its batches, loss and validation."""

    kind: Kind
    group: Group
    belongs: dict[str, str]
    """Hashes of the artifacts that the model is trained with, by role."""
    judged_by: str
    """Name of the validation's loss whose lowest value makes the best checkpoint."""
    less_memory: str
    """Advice on what to set in the recipe if a GPU runs out of memory."""

    @property
    def comparable_from(self) -> int:
        """Update from which on held-out losses are comparable, because the objective no longer changes."""

    @property
    def model(self) -> nn.Module:
        """The model, on the group's device."""

    def work(self) -> SampleWork:
        """Return the work in a training sample."""

    def batches(self, start: int, stop: int, order: Order) -> Iterator[Any]:
        """Yield this rank's part of the batch of each update from ``start`` up to ``stop``, in the named order."""

    def micro_batches(self, batch: Any, size: int | None) -> list[tuple[Any, float]]:
        """Split ``batch`` into parts of ``size`` samples, each with its share of the batch of all ranks."""

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Return scalars to log, of which ``"loss"`` is minimised."""

    def validate(self, step: int) -> dict[str, float]:
        """Return scalars on held-out samples, if there are any.

        That named ``judged_by`` chooses the best checkpoint, and ``"loss"`` drives the plateau schedule if that watches
        validations.
        """

    def example_images(self) -> dict[str, Tensor]:
        """Return example outputs, images (3, H, W) uint8 by name; called after ``validate``."""

    def decayed(self) -> set[str]:
        """Return the names of the parameters that weight decay applies to."""

    def after_update(self) -> None:
        """Apply constraints to the weights after an update."""


class Run:
    """A training run of ``task`` in the folder ``out``; by default each rank holds the whole model.

    ``extend`` adds a round of that many updates to a finished run, in which the learning rate runs through its schedule
    once more. An unfinished run is only finished.
    """

    def __init__(
        self, task: Task, recipe: Recipe, out: Path, engine: Engine | None = None, extend: int | None = None
    ) -> None:
        self.task, self.group, self.recipe, self.out, self.extend = task, task.group, recipe, out, extend
        self.settings: Stage = getattr(recipe, task.kind)
        self.engine = engine or Replicated(task.model, task.group)
        self.stop = StopRequest()
        self.look_back = LookBack(self.group)
        self.name = f"train-{task.kind}"

    def train(self) -> Checkpoint:
        """Train to the recipe's last update, from the newest checkpoint in ``out`` if there is one.

        Raises:
            UserError: ``out`` holds a run of other settings or inputs, or another process trains in it; the loss is not
                finite; the disk or the GPU's memory is full; there are more ranks than samples in a batch; or a rank is
                lost.
            Stopped: a rank received a signal; all ranks stopped after the same update, which was saved.
        """
        require_wandb(self.recipe.monitoring.wandb)
        self._check_batch_size()
        if not is_unicode(str(self.out)):
            raise UserError(f"{self.out}: its name is not UTF-8, which TensorBoard cannot write; choose another --out")
        with explain_os_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        for line in odd_settings(self.recipe, self.task.kind):
            log(f"{self.name}: warning: {line}")
        use_settings(self.recipe)
        with self._owned(), explain_out_of_memory(self.out, self.task.less_memory), explain_lost_workers(), self.stop:
            state = TrainingState(self.engine, self.settings, self.task.decayed(), self.recipe.seed)
            state.best.by = self.task.judged_by
            checkpoint = self._resume(state)
            start, validated = (checkpoint.step, dict(checkpoint.metrics)) if checkpoint else (0, {})
            self.group.require_same("recipe or checkpoint", f"{start} {dump_recipe(self.recipe)}")
            if start < state.last_update and not state.out_of_patience:
                with self.group.explain_lost_ranks():
                    self._train(state, start, validated)
        # No rank exits before the leader has saved, since launchers end all ranks once one has exited.
        self.group.barrier()
        if self.stop.agreed:
            raise Stopped
        return self._result()

    @contextmanager
    def _owned(self) -> Iterator[None]:
        """Own the run's folder for all ranks; raise UserError on every rank if another training owns it."""
        refusal: UserError | None = None
        with ExitStack() as held:
            if self.group.leads:
                try:
                    held.enter_context(owned(self.out))
                except UserError as error:
                    refusal = error
            if self.group.any(refusal is not None):
                raise refusal or UserError(f"{self.out}: is being written by another training")
            yield

    def _result(self) -> Checkpoint:
        """Open the newest checkpoint, name the best one, and log what its validations warn of."""
        newest, best = (open_checkpoint(self.out, self.task.kind, which) for which in ("last", "best"))
        if newest.best is not None:
            if best.step < newest.step:
                log(
                    f"{self.name}: the {newest.best.name} was lowest after {best.step} updates; later stages use "
                    f"{best.path.name} (--checkpoint last: {newest.path.name})"
                )
            for warning in validation_warnings(newest):
                log(f"{self.name}: warning: {warning}")
        return newest

    def _check_batch_size(self) -> None:
        size, ranks = self.settings.training.batch_size, self.group.size
        key = f"{self.task.kind}.training.batch_size"
        if ranks > size:
            raise UserError(f"{key}: {size} samples cannot be shared among {ranks} ranks; raise it, or start fewer")
        if self.engine.sharded and size % ranks:
            raise UserError(
                f"{key}: {size} samples are no multiple of the {ranks} ranks that share the model; set a multiple"
            )

    def _train(self, state: TrainingState, start: int, validated: dict[str, float]) -> None:
        """Train from update ``start``; ``validated`` has the metrics of the last validation before it."""
        task, group, training, note = self.task, self.group, self.settings.training, ""
        last = state.last_update
        with (
            Journal(self.out, start, writes=group.leads, more=self._more_loggers()) as journal,
            progress(self.name, last, "updates", start, steady=True) as bar,
        ):
            throughput = self._throughput()
            on_cpu_alone = group.size == 1 and group.device.type == "cpu"
            idle_cores = IdleCores() if self.recipe.threads == "idle" and on_cpu_alone else None
            if self.recipe.threads == "idle" and idle_cores is None:
                log(f"{self.name}: warning: threads: idle is for one process on a CPU, and is ignored here")
            for step, batch in zip(range(start, last), task.batches(start, last, state.order), strict=True):
                done, sent_before = step + 1, self.engine.traffic()
                rate = state.learning_rate(step)
                values = self.update(state, batch, step, rate)
                self.stop.note_progress()
                if idle_cores is not None:
                    idle_cores.follow()
                state.update_ema(step)
                self.look_back.note_loss(done, values["loss"])
                logs = done == 1 or state.due(training.log_every, done)
                self._look_at_losses(state, every=logs)
                throughput.count_update()
                if group.leads and logs:
                    scalars = {name: float(value) for name, value in values.items()}
                    sent = {name: total - sent_before[name] for name, total in self.engine.traffic().items()}
                    journal.log_training(done, rate, {**scalars, **sent, **throughput.measure()})
                if group.leads and (logs or group.device.type == "cpu"):  # a GPU would be waited for
                    when = "" if group.device.type == "cpu" else f" at update {done:,}"
                    note = f"loss {float(values['loss']):.4f}{when}"
                with throughput.paused():
                    if state.due(training.validate_every, done):
                        validated = self._validate(state, done, journal, bar) or validated
                    self.stop.agreed = self.look_back.any_request(self.stop.signal is not None) and done < last
                    finished = state.out_of_patience
                    wanted = self.stop.agreed or finished or state.best.step == done
                    if wanted or state.due(training.save_every, done):
                        journal.flush()
                        self._save(state, done, validated)
                bar.advance(1, note)
                if self.stop.agreed:
                    reason = self.stop.signal or "a signal to another rank"
                    bar.say(
                        f"{self.name}: stopped by {reason}: saved {step_folder(self.out, done)} of {last} "
                        f"updates; exit code {RESUMABLE}; run the same command to resume"
                    )
                    break
                if finished:
                    bar.say(f"{self.name}: ended after {done} updates: {training.patience} validations without a gain")
                    break

    def update(self, state: TrainingState, batch: Any, step: int, rate: float) -> dict[str, Tensor]:
        """Make the update that follows ``step`` updates, with learning rate ``rate``, and return values to log."""
        task = self.task
        task.model.train()
        state.optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        micro_batches = task.micro_batches(batch, self.settings.training.micro_batch)
        for i, (micro_batch, share) in enumerate(micro_batches):
            self.engine.begin_micro_batch(last=i == len(micro_batches) - 1)
            values = self.engine.forward(task.loss, micro_batch, step)
            self.engine.backward(values["loss"] * share)
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach() * share
        totals = self.group.sum_scalars(totals)
        self.engine.collect_gradients(step)
        totals |= state.optimizer.step(rate)
        task.after_update()
        self.engine.release_gathered()
        return totals

    def _look_at_losses(self, state: TrainingState, *, every: bool = False) -> None:
        """Pass the losses of finished updates, or of ``every`` update, to the plateau schedule.

        Raises:
            UserError: one of them is not finite.
        """
        for update, loss in self.look_back.losses(every=every):
            if not math.isfinite(loss):
                raise UserError(f"{self.out}: the loss is {loss} at update {update}; {self._mend}")
            state.plateau.add_training_loss(loss)

    def _validate(self, state: TrainingState, step: int, journal: Journal, bar: Progress) -> dict[str, float]:
        """Validate with the EMA weights and, as ``raw_``, with the raw weights; update the plateau schedule.

        If every rank holds the whole model, only the leader validates and the others return nothing.
        """
        self._look_at_losses(state, every=True)
        validated: dict[str, float] = {}
        if self.group.leads or self.engine.sharded:
            self.task.model.eval()
            state.optimizer.zero_grad()  # to free their memory
            with torch.no_grad():
                raw = self.task.validate(step)
                if raw:
                    with state.ema_weights():
                        values, images = self.task.validate(step), self.task.example_images()
                    text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                    bar.say(f"{self.name}: validation after {step} updates: {text}")
                    validated = {**values, **{f"raw_{name}": value for name, value in raw.items()}}
                    journal.log_validation(step, validated, images)
        if self.group.any(bool(validated) and not math.isfinite(validated["loss"])):
            raise UserError(f"{self.out}: the held-out loss is not finite after {step} updates; {self._mend}")
        # Only every so many updates: a run that goes on would not have validated after its last update alone.
        if step % self.settings.training.validate_every == 0:
            if self.settings.learning_rate.plateau_watches == "training":
                state.plateau.observe_training()
            elif not math.isnan(loss := self.group.broadcast(validated.get("raw_loss", math.nan))):
                state.plateau.observe(loss)
        ema_loss = self.group.broadcast(validated.get(state.best.by, math.nan))
        if step >= self.task.comparable_from and math.isfinite(ema_loss):
            state.best.observe(step, ema_loss)
        return validated

    @property
    def _mend(self) -> str:
        """Advice against numbers that are not finite."""
        kind = self.task.kind
        mend = f"lower {kind}.learning_rate.peak and begin again, with another --out or without this folder"
        if not steps_in(self.out):
            return mend
        return f"{mend}; with another --out, --set {kind}.init={self.out} keeps the weights of its last checkpoint"

    def _save(self, state: TrainingState, step: int, metrics: dict[str, float]) -> None:
        """Save a checkpoint; raise UserError, and save none, if a loss or a weight is not finite."""
        self._look_at_losses(state, every=True)
        if self.group.any(not state.weights_are_finite()):
            raise UserError(
                f"{self.out}: weights are not finite after {step} updates, so they are not saved; {self._mend}"
            )
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        best = Best(state.best.step, state.best.loss, state.best.by) if state.best.step else None
        facts = CheckpointFacts(
            self.task.kind,
            step,
            self.recipe,
            self.task.belongs,
            finite,
            best,
            state.last_update,
            ended_early=step < state.last_update and state.out_of_patience,
        )
        if self.engine.sharded:
            save_sharded_checkpoint(step_folder(self.out, step), self.group, facts, state.checkpoint_shards(step))
        elif self.group.leads:
            save_checkpoint(step_folder(self.out, step), facts, state.checkpoint(step))
        if self.group.leads:
            prune(self.out, self.settings.training.keep, facts.best)

    def _resume(self, state: TrainingState) -> Checkpoint | None:
        """Load the newest whole checkpoint, if any, into ``state`` and return it.

        Raises:
            UserError: the run may not resume, or there is no checkpoint and the run was to be extended.
        """
        checkpoint = self._newest_whole()
        if checkpoint is None:
            if self.extend is not None:
                raise UserError(f"{self.out}: --extend {self.extend}: there is no run to extend; leave it out")
            return None
        check_resumable(self.out, checkpoint, self.recipe, self.task.belongs)
        if "init" in checkpoint.belongs:
            self.task.belongs["init"] = checkpoint.belongs["init"]
        state.load_schedules(checkpoint)
        if self.extend is not None:
            self._extend(state, checkpoint.step)
        if checkpoint.step >= state.last_update:
            log(f"{self.out}: already trained, {checkpoint.step} of {state.last_update} updates")
        elif state.out_of_patience:
            log(f"{self.out}: already trained; patience ended it at {checkpoint.step} of {state.last_update} updates")
        else:
            state.load(checkpoint)
            log(f"{self.out}: resumes from {checkpoint.path.name}")
        return checkpoint

    def _extend(self, state: TrainingState, step: int) -> None:
        """Add a round of training after ``step``, unless the run has not come to the end of its last one."""
        if step < state.last_update and not state.out_of_patience:
            log(f"{self.out}: is at update {step} of {state.last_update}; this run finishes it and does not extend it")
            return
        state.begin_round(step, cast(int, self.extend))
        log(f"{self.out}: extended by {self.extend} updates; the learning rate runs through its schedule once more")

    def _newest_whole(self) -> Checkpoint | None:
        """Open the newest checkpoint whose files are what was written; say so if newer ones are not.

        Raises:
            Damaged: there are checkpoints, and none is whole.
        """
        damage: Damaged | None = None
        for folder in reversed(steps_in(self.out)):
            own: Damaged | None = None
            try:
                checkpoint = open_checkpoint(folder, self.task.kind)
                checkpoint.check(self.group.rank, self.group.size)
            except Damaged as error:
                own = error
            if not self.group.any(own is not None):
                return checkpoint
            damage = own or Damaged(f"{folder}: another rank found a damaged file")
            log(f"{self.name}: {damage}; looking for an older one")
        if damage is not None:
            raise damage
        return None

    def _throughput(self) -> Throughput:
        work, batch_size = self.task.work(), self.settings.training.batch_size
        if not self.group.leads:
            return Throughput(work, batch_size, self.group.size, math.inf)
        if warning := precision_warning(f"{self.task.kind}.precision", work.dtype, self.group.device):
            log(f"{self.name}: warning: {warning}")
        given = self.recipe.monitoring.peak_tflops
        if given is not None:  # whoever sets it asks for the MFU
            log(
                f"{self.name}: {work.flops / 1e9:.3g} GFLOP a sample; mfu is the share of {given:.3g} TFLOP/s a "
                "device, as monitoring.peak_tflops says"
            )
        peak = peak_tflops(work.dtype, self.group.device) if given is None else given
        return Throughput(work, batch_size, self.group.size, peak)

    def _more_loggers(self) -> list[Callable[[], MetricLogger]]:
        recipe, kind = self.recipe, self.task.kind
        if (project := recipe.monitoring.wandb) is None:
            return []
        config = {"stage": kind, **recipe.model_dump(mode="json")}
        return [lambda: WandbLogger(self.out, project, f"{recipe.name} {kind}", config)]
