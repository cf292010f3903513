"""The one training loop: the dVAE, the prior and CLIP differ only in their ``Task``.

Nothing in an update depends on what ran before it except the weights and moments: batches, noise and schedules are
functions of (seed, step). So a killed run that starts again at its newest checkpoint ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dalle_cli.errors import UserError
from dalle_cli.progress import Progress, log, progress
from dalle_cli.recipes.schema import Adam, LearningRate, Recipe, Training
from dalle_cli.stores.checkpoint import Checkpoint, Kind, open_checkpoint, prune, save_checkpoint, step_folder, steps_in
from dalle_cli.stores.files import explain_os_errors, write_atomically
from dalle_cli.training.schedules import Plateau, learning_rate

# What may change in a stage's training block when a run goes on: nothing here touches the mathematics.
_FREE_KEYS = ("log_every", "validate_every", "validation_samples", "save_every", "keep", "workers", "micro_batch")
EMA_WARMUP = 10
"""The EMA's decay after t updates is min(decay, (1 + t) / (EMA_WARMUP + t)), so that early weights do not linger."""


class Task(Protocol):
    """What is being trained."""

    kind: Kind

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """One batch for each update from ``start`` up to ``stop``."""

    def micro_batches(self, batch: Any, size: int | None) -> list[tuple[Any, float]]:
        """The batch in parts of ``size`` samples, each with its share of the loss."""

    def loss(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Scalars to log; ``"loss"`` is minimised."""

    def validate(self, step: int) -> dict[str, float]:
        """Scalars of ``model`` as it is on held-out samples, none where nothing is held out.

        ``"loss"`` steers the plateau schedule.
        """

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

    def train(self) -> Checkpoint:
        """Train to the recipe's last update, from the newest checkpoint in ``out`` if there is one.

        Raises:
            UserError: ``out`` holds a run of other settings or inputs, the loss is no longer finite, the disk is full.
        """
        with explain_os_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        limit_threads(self.recipe)
        model, updates = self.task.model, self.training.updates
        optimizer = _build_optimizer(self.task, self.adam)
        parameters = [p for p in model.parameters() if p.requires_grad]
        ema = [p.detach().clone() for p in parameters]
        plateau = Plateau(self.learning_rate)
        resumed = self._resume(optimizer, ema, plateau)
        start, validated = (resumed.step, dict(resumed.metrics)) if resumed else (0, {})
        if start >= updates:
            log(f"{self.out}: already trained, {start} of {updates} {self.unit}")
            return open_checkpoint(self.out, self.task.kind)
        metrics = _MetricsFile(self.out / "metrics.jsonl", start)
        began = time.monotonic()
        with progress(f"train-{self.task.kind}", updates, self.unit, start) as bar:
            for step, batch in zip(range(start, updates), self.task.batches(start, updates), strict=True):
                rate = learning_rate(self.learning_rate, step, updates, plateau.halvings)
                values = self._update(optimizer, parameters, batch, step, rate)
                _update_ema(ema, parameters, self.training.ema_decay, step)
                done = step + 1
                if done % self.training.log_every == 0 or done == updates or done == 1:
                    scalars = {name: float(value) for name, value in values.items()}
                    metrics.write({"step": done, "lr": rate, "seconds": round(time.monotonic() - began, 3), **scalars})
                    bar.advance(0, note=f"loss {scalars['loss']:.4f}")
                if done % self.training.validate_every == 0 or done == updates:
                    validated = self._validate(ema, parameters, done, bar)
                    if validated:
                        metrics.write({"step": done, **{f"val_{k}": v for k, v in validated.items()}})
                        plateau.observe(validated.get("raw_loss", math.inf))
                if done % self.training.save_every == 0 or done == updates:
                    self._save(done, optimizer, ema, plateau, validated)
                bar.advance(1, note=f"loss {scalars['loss']:.4f}")
        return open_checkpoint(self.out, self.task.kind)

    def _update(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], batch: Any, step: int, rate: float
    ) -> dict[str, Tensor]:
        self.task.model.train()
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part, share in self.task.micro_batches(batch, self.training.micro_batch):
            values = self.task.loss(part, step)
            (values["loss"] * share).backward()  # type: ignore[no-untyped-call]
            for name, value in values.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach() * share
        if not math.isfinite(float(totals["loss"])):
            raise UserError(
                f"{self.out}: the loss is {float(totals['loss'])} at update {step + 1}; "
                f"lower {self.task.kind}.learning_rate.peak and start again from the last checkpoint"
            )
        if self.adam.clip_norm is not None:
            totals["grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.adam.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        self.task.after_update()
        return totals

    def _validate(
        self, ema: list[Tensor], parameters: list[nn.Parameter], step: int, bar: Progress
    ) -> dict[str, float]:
        model = self.task.model
        model.eval()
        with torch.no_grad():
            raw = self.task.validate(step)
            if not raw:
                return {}
            with _swapped(parameters, ema):
                values = self.task.validate(step)
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        bar.say(f"train-{self.task.kind}: validation after {step} {self.unit}: {text}")
        return {**values, "raw_loss": raw["loss"]}

    def _save(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        ema: list[Tensor],
        plateau: Plateau,
        metrics: dict[str, float],
    ) -> None:
        model = self.task.model
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        raw = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        moments = {}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = value
        save_checkpoint(
            step_folder(self.out, step),
            kind=self.task.kind,
            step=step,
            recipe=self.recipe,
            belongs=self.belongs,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            weights={"raw": raw, "ema": {**raw, **dict(zip(names, ema, strict=True))}},
            optimizer=moments,
            trainer_state={"step": step, "plateau": plateau.state},
        )
        prune(self.out, self.training.keep)

    def _resume(self, optimizer: torch.optim.Optimizer, ema: list[Tensor], plateau: Plateau) -> Checkpoint | None:
        if not steps_in(self.out):
            return None
        found = open_checkpoint(self.out, self.task.kind)
        self._refuse_other_settings(found)
        model = self.task.model
        model.load_state_dict(found.tensors("raw"))
        averaged = found.tensors("ema")
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        for name, target in zip(names, ema, strict=True):
            target.copy_(averaged[name])
        moments, state = found.trainer()
        for name, parameter in model.named_parameters():
            keys = {key.partition(".")[0] for key in moments if key.partition(".")[2] == name}
            if keys:
                optimizer.state[parameter] = {key: _laid_out_like(parameter, moments[f"{key}.{name}"]) for key in keys}
        plateau.state = dict(state["plateau"])
        log(f"{self.out}: goes on from {found.path.name}")
        return found

    def _refuse_other_settings(self, found: Checkpoint) -> None:
        for role, value in self.belongs.items():
            if found.belongs.get(role) != value:
                raise UserError(
                    f"{self.out}: was begun with the {role} {str(found.belongs.get(role))[:12]}, now {value[:12]}; "
                    "choose another --out, or delete the folder to begin again"
                )
        then, now = found.recipe().model_dump(), self.recipe.model_dump()
        training = f"{self.task.kind}.training"
        free = {f"{training}.{key}" for key in _FREE_KEYS}
        if self.learning_rate.schedule != "cosine" or self.learning_rate.decay_updates:
            free.add(f"{training}.updates")
        for key in self.stage_keys:
            for name, old, new in _differences(key, then[key], now[key]):
                if name not in free:
                    raise UserError(
                        f"{self.out}: was begun with {name} = {old!r}, the recipe now says {new!r}; "
                        "set it back, choose another --out, or delete the folder to begin again"
                    )


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differences(f"{name}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield name, old, new


def _build_optimizer(task: Task, adam: Adam) -> torch.optim.Optimizer:
    decayed = task.decayed()
    named = [(name, p) for name, p in task.model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": adam.weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        fused=True,
    )


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` with the strides of ``parameter`` (channels last, for instance), as the optimizer made it."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value


@torch.no_grad()
def _update_ema(ema: list[Tensor], parameters: list[nn.Parameter], decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (EMA_WARMUP + step))
    torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)


class _swapped:
    """Inside the block, the parameters hold the averaged values."""

    def __init__(self, parameters: list[nn.Parameter], values: list[Tensor]) -> None:
        self.parameters, self.values = parameters, values

    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters]
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)

    def __exit__(self, *_: object) -> None:
        for parameter, value in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(value)


class _MetricsFile:
    """JSON lines of scalars; lines beyond the step that a run resumes at are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
        write_atomically(path, "".join(kept))

    def write(self, values: dict[str, Any]) -> None:
        with explain_os_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def limit_threads(recipe: Recipe) -> None:
    """Let torch use the recipe's number of CPU threads, if it names one."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
