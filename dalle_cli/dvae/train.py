"""Training the dVAE (paper, section 2.1 and appendix A.2) as a task of the one training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from dalle_cli.config.schema import DOWNSAMPLING, Recipe
from dalle_cli.data.images import BadImage
from dalle_cli.data.picture_loader import TrainingPictures, load_eval_picture
from dalle_cli.data.source import BadSample, Source
from dalle_cli.distributed.group import ALONE, Group, join_group
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import dvae_loss, merge_metrics, phi, reconstruct, validation_metrics
from dalle_cli.errors import UserError
from dalle_cli.randomness import torch_generator
from dalle_cli.stores.checkpoint import Checkpoint, Kind
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.training.loop import Run
from dalle_cli.training.schedules import ramp
from dalle_cli.training.throughput import SampleWork, training_flops

VALIDATION_BATCH = 64
EXAMPLES = 8
"""Held-out pictures shown in TensorBoard."""


@dataclass
class DvaeTask:
    """The relaxed ELBO on random crops; validation by hard codes, in 32 bit, on held-out pictures."""

    recipe: Recipe
    source: Source
    model: DVAE
    group: Group = ALONE
    belongs: dict[str, str] = field(default_factory=dict)
    kind: Kind = "dvae"
    less_memory: str = "lower dvae.training.micro_batch, or set dvae.model.checkpoint_resblocks to true"

    def __post_init__(self) -> None:
        rows = np.arange(len(self.source))
        self.training_rows, self.held_out = split_holdout(rows, self.recipe.data.holdout, self.recipe.seed)

    def work(self) -> SampleWork:
        # Counted for one code: autocast knows no model without storage, and convolutions cost the same everywhere.
        pixels, codes = torch.zeros(1, 3, DOWNSAMPLING, DOWNSAMPLING, device=self.group.device), self.recipe.grid**2
        flops = training_flops(lambda: self.model.decoder(self.model.encoder(pixels).softmax(1)))
        dtype = torch.bfloat16 if self.recipe.dvae.precision == "bf16" else torch.float32
        return SampleWork(codes, codes * flops, dtype)

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
            part=self.group.part(training.batch_size),
        )
        for batch, _, _ in pictures.batches(start, stop):
            yield batch

    def micro_batches(self, batch: Tensor, size: int | None) -> list[tuple[Any, float]]:
        whole = self.recipe.dvae.training.batch_size
        first, parts = self.group.part(whole).start, batch.split(size or len(batch))
        return [((first + i * len(parts[0]), part), len(part) / whole) for i, part in enumerate(parts)]

    def loss(self, batch: tuple[int, Tensor], step: int) -> dict[str, Tensor]:
        first, pictures = batch
        objective, device = self.recipe.dvae.objective, self.group.device
        kl_weight, temperature = ramp(objective.kl_weight, step), ramp(objective.temperature, step)
        places = range(first, first + len(pictures))
        # Autocast turns convolutions to bf16, but for those that give logits or the likelihood's parameters.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.recipe.dvae.precision == "bf16"):
            found = dvae_loss(
                self.model,
                pictures.to(device),
                kl_weight=kl_weight,
                marginal_kl_weight=ramp(objective.marginal_kl_weight, step),
                temperature=temperature,
                eps=objective.logit_laplace_eps,
                ln_b_floor=objective.ln_b_floor,
                estimator=objective.estimator,
                reinforce_samples=objective.reinforce_samples,
                generator=[torch_generator(self.recipe.seed, "dvae", step, place, device=device) for place in places],
                batch_mean=self._batch_mean if self.group.size > 1 else None,
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
        objective, seed, device = self.recipe.dvae.objective, self.recipe.seed, self.group.device
        size = self.recipe.dvae.training.micro_batch or VALIDATION_BATCH
        metrics = []
        for first in range(0, len(self.validation_pictures), size):
            part = self.validation_pictures[first : first + size].to(device)
            places = range(first, first + len(part))
            noise = [torch_generator(seed, "dvae validation", place, device=device) for place in places]
            metrics.append(
                validation_metrics(self.model, part, objective.logit_laplace_eps, objective.ln_b_floor, noise)
            )
        summary = merge_metrics(metrics).summary()
        return {"loss": summary["recon_nll"], **summary}

    def example_images(self) -> dict[str, Tensor]:
        """Originals, each with its reconstruction to the right, two pairs a line."""
        if self.validation_pictures is None:
            return {}
        eps = self.recipe.dvae.objective.logit_laplace_eps
        originals = self.validation_pictures[:EXAMPLES]
        mu, _ = self.model(phi(originals.to(self.group.device), eps))
        rebuilt = reconstruct(mu, eps).round().to(torch.uint8).cpu()
        pairs = torch.stack([originals, rebuilt], dim=1).flatten(0, 1)
        return {"reconstructions": make_grid(pairs, nrow=4, pad_value=255)}

    def decayed(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.ndim > 1}

    def after_update(self) -> None:
        """The dVAE's weights are unconstrained."""

    def _batch_mean(self, own: Tensor) -> Tensor:
        """The mean over all processes' parts of a batch, of this process's mean over its own."""
        whole = self.recipe.dvae.training.batch_size
        part = self.group.part(whole)
        return self.group.sum(own * ((part.stop - part.start) / whole))

    @cached_property
    def validation_pictures(self) -> Tensor | None:
        """The first held-out pictures that can be read, (n, 3, S, S) uint8."""
        pictures = []
        for row in self.held_out[: self.recipe.dvae.training.validation_samples]:
            try:
                pictures.append(load_eval_picture(self.source, int(row), self.recipe.image_size, self.recipe.data))
            except (BadSample, BadImage):
                continue
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous() if pictures else None


def train_dvae(recipe: Recipe, source: Source, out: Path) -> Checkpoint:
    """Train the recipe's dVAE on ``source`` into the run's folder ``out``; goes on where an earlier run stopped.

    Raises:
        UserError: see ``Run.train``; or the first pictures cannot be read.
    """
    _refuse_unreadable(source, recipe)
    with join_group() as group:
        model = DVAE(recipe.dvae.model, seed=recipe.seed).to(memory_format=torch.channels_last).to(group.device)
        return Run(DvaeTask(recipe, source, model, group), recipe, out).train()


def load_dvae(checkpoint: Checkpoint) -> DVAE:
    """The dVAE of a checkpoint (its EMA weights), ready for encoding and decoding."""
    model = DVAE(checkpoint.recipe().dvae.model)
    model.load_state_dict(checkpoint.tensors("ema"))
    model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def _refuse_unreadable(source: Source, recipe: Recipe) -> None:
    """Say at once when nothing can be read, rather than from inside a worker."""
    reason = ""
    for row in range(0, len(source), max(1, len(source) // 100)):  # spread: the first may all be filtered
        try:
            load_eval_picture(source, row, recipe.image_size, recipe.data)
        except (BadSample, BadImage) as error:
            reason = reason or f"{source.key(row)}: {error}"
        else:
            return
    raise UserError(
        f"{source.name}: none of the pictures tried can be used ({reason}); name a source of whole pictures"
    )
