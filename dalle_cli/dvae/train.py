"""Training the dVAE (paper, section 2.1 and appendix A.2) as a task of the one training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.data.images import BadImage
from dalle_cli.data.sources import BadSample, Source
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import dvae_loss, merge_metrics, validation_metrics
from dalle_cli.errors import UserError
from dalle_cli.recipes.schema import Recipe
from dalle_cli.stores.checkpoint import Checkpoint, Kind
from dalle_cli.training.loop import Run
from dalle_cli.training.order import split_holdout
from dalle_cli.training.pictures import TrainingPictures, cut_picture
from dalle_cli.training.randomness import torch_generator
from dalle_cli.training.schedules import ramp

VALIDATION_BATCH = 64


@dataclass
class DvaeTask:
    """The relaxed ELBO on random crops; validation by hard codes on held-out pictures."""

    recipe: Recipe
    source: Source
    model: DVAE
    kind: Kind = "dvae"

    def __post_init__(self) -> None:
        rows = np.arange(len(self.source))
        self.training_rows, self.held_out = split_holdout(rows, self.recipe.data.holdout, self.recipe.seed)

    def batches(self, start: int, stop: int) -> Iterator[Tensor]:
        training = self.recipe.dvae.training
        pictures = TrainingPictures(
            self.source,
            self.training_rows,
            self.recipe.image_size,
            self.recipe.data,
            self.recipe.seed,
            training.batch_size,
            flip=self.recipe.data.flip,
            workers=training.workers,
        )
        for batch, _, _ in pictures.batches(start, stop):
            yield batch

    def micro_batches(self, batch: Tensor, size: int | None) -> list[tuple[Any, float]]:
        parts = batch.split(size or len(batch))
        return [((i * len(parts[0]), part), len(part) / len(batch)) for i, part in enumerate(parts)]

    def loss(self, batch: tuple[int, Tensor], step: int) -> dict[str, Tensor]:
        first, pictures = batch
        objective = self.recipe.dvae.objective
        kl_weight, temperature = ramp(objective.kl_weight, step), ramp(objective.temperature, step)
        found = dvae_loss(
            self.model,
            pictures,
            kl_weight=kl_weight,
            marginal_kl_weight=objective.marginal_kl_weight,
            temperature=temperature,
            eps=objective.logit_laplace_eps,
            ln_b_floor=objective.ln_b_floor,
            estimator=objective.estimator,
            reinforce_samples=objective.reinforce_samples,
            generator=[torch_generator(self.recipe.seed, "dvae", step, first + i) for i in range(len(pictures))],
        )
        return {
            "loss": found.loss,
            "recon_nll": found.recon_nll,
            "kl": found.kl,
            "kl_per_position": found.kl_per_position,
            "elbo": found.elbo,
            "kl_weight": torch.tensor(kl_weight),
            "temperature": torch.tensor(temperature),
        }

    def validate(self, step: int) -> dict[str, float]:
        if self.validation_pictures is None:
            return {}
        objective = self.recipe.dvae.objective
        parts = [
            validation_metrics(self.model, part, objective.logit_laplace_eps, objective.ln_b_floor)
            for part in self.validation_pictures.split(VALIDATION_BATCH)
        ]
        summary = merge_metrics(parts).summary()
        return {"loss": summary["recon_nll"], **summary}

    def decayed(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.ndim > 1}

    def after_update(self) -> None:
        """The dVAE's weights are unconstrained."""

    @cached_property
    def validation_pictures(self) -> Tensor | None:
        """The first held-out pictures that can be read, (n, 3, S, S) uint8."""
        pictures = []
        for row in self.held_out[: self.recipe.dvae.training.validation_samples]:
            try:
                pictures.append(cut_picture(self.source, int(row), self.recipe.image_size, self.recipe.data))
            except (BadSample, BadImage):
                continue
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() if pictures else None


def train_dvae(recipe: Recipe, source: Source, out: Path) -> Checkpoint:
    """Train the recipe's dVAE on ``source`` into the run's folder ``out``; goes on where an earlier run stopped.

    Raises:
        UserError: see ``Run.train``; or the first pictures cannot be read.
    """
    _refuse_unreadable(source, recipe)
    model = DVAE(recipe.dvae.model, seed=recipe.seed).to(memory_format=torch.channels_last)
    task = DvaeTask(recipe, source, model)
    stage = recipe.dvae
    run = Run(
        task, recipe, out, stage.training, stage.adam, stage.learning_rate, ("seed", "image_size", "data", "dvae")
    )
    return run.train()


def load_dvae(checkpoint: Checkpoint) -> DVAE:
    """The dVAE of a checkpoint (its EMA weights), ready for encoding and decoding."""
    model = DVAE(checkpoint.recipe().dvae.model)
    model.load_state_dict(checkpoint.tensors("ema"))
    model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def _refuse_unreadable(source: Source, recipe: Recipe) -> None:
    """Say at once when nothing can be read, rather than from inside a worker."""
    reason = ""
    for row in range(min(len(source), 100)):
        try:
            cut_picture(source, row, recipe.image_size, recipe.data)
        except (BadSample, BadImage) as error:
            reason = reason or f"{source.key(row)}: {error}"
        else:
            return
    raise UserError(
        f"{source.name}: none of the first pictures can be read ({reason}); name a source of whole pictures"
    )
