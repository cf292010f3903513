"""The dVAE's training (paper, section 2.1 and appendix A.2) as a task of the shared training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import Recipe
from dalle_cli.data.batch_order import Order
from dalle_cli.data.images import BadImage
from dalle_cli.data.joined import sizes_of
from dalle_cli.data.picture_loader import TrainingPictures, load_eval_picture
from dalle_cli.data.source import BadSample, Source
from dalle_cli.distributed.device import explain_out_of_memory, require_precision, use_settings
from dalle_cli.distributed.engine import Replicated
from dalle_cli.distributed.group import ALONE, Group, join_group
from dalle_cli.dvae.model import CHANNELS, DVAE
from dalle_cli.dvae.objective import (
    LossSettings,
    dvae_loss,
    encoder_input,
    merge_metrics,
    reconstructed_images,
    validation_metrics,
)
from dalle_cli.dvae.perceptual import PerceptualDistance
from dalle_cli.errors import UserError
from dalle_cli.precision.formats import DTYPES
from dalle_cli.pretrained import weights_hash
from dalle_cli.randomness import torch_generator
from dalle_cli.stores.checkpoint import Checkpoint, Kind, Which, open_checkpoint
from dalle_cli.stores.held_out import split_rows
from dalle_cli.stores.row_set import RowSet
from dalle_cli.training.ancestor import open_ancestor
from dalle_cli.training.loop import Run
from dalle_cli.training.picture_grid import picture_grid
from dalle_cli.training.precision_choice import Update, settle_precision, trial_update
from dalle_cli.training.schedules import ramp
from dalle_cli.training.throughput import SampleWork, training_flops
from dalle_cli.training.trial import agrees, prepare_compiler
from dalle_cli.transfers import send

VALIDATION_BATCH = 64
EXAMPLES = 8
"""Number of held-out images shown in TensorBoard."""
SAME = tuple(f"dvae.model.{key}" for key in ("n_hid", "n_init", "blocks_per_group", "downsampling", "codebook_size"))
"""Settings in which a dVAE may not differ from the one that it begins from."""


@dataclass
class DvaeTask:
    """Training with the relaxed ELBO on random crops, and validation with hard codes, in 32 bit, on held-out images."""

    recipe: Recipe
    source: Source
    model: DVAE
    group: Group = ALONE
    belongs: dict[str, str] = field(default_factory=dict)
    kind: Kind = "dvae"
    judged_by: str = "loss"
    perceptual: PerceptualDistance | None = None
    less_memory: str = "lower dvae.training.micro_batch, or set dvae.model.checkpoint_resblocks to true"

    def __post_init__(self) -> None:
        rows = RowSet.full(len(self.source))
        self._replaced = 0.0
        self.training_rows, self.held_out = split_rows(rows, self.recipe, sizes_of(self.source))

    @property
    def comparable_from(self) -> int:
        objective = self.recipe.dvae.objective
        return max(ramp.updates for ramp in (objective.kl_weight, objective.marginal_kl_weight, objective.temperature))

    def work(self) -> SampleWork:
        # Counted for an image of one code and scaled by the area; autocast does not work on the meta device.
        side, codes = self.recipe.dvae.model.downsampling, self.recipe.grid**2
        pixels = torch.zeros(1, 3, side, side, device=self.group.device)
        flops = training_flops(lambda: self.model.decoder(self.model.encoder(pixels).softmax(1)))
        return SampleWork(codes, codes * flops, DTYPES[self.recipe.dvae.precision])

    def batches(self, start: int, stop: int, order: Order = "random blocks") -> Iterator[Tensor]:
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
            crop=self.recipe.data.dvae_crop,
            part=self.group.part(training.batch_size),
        )
        for batch in pictures.batches(start, stop, order):
            self._replaced = batch.replaced
            yield batch.pictures

    def micro_batches(self, batch: Tensor, size: int | None) -> list[tuple[Any, float]]:
        whole = self.recipe.dvae.training.batch_size
        first, parts = self.group.part(whole).start, batch.split(size or len(batch))
        return [((first + i * len(parts[0]), part), len(part) / whole) for i, part in enumerate(parts)]

    def loss(self, batch: tuple[int, Tensor], step: int) -> dict[str, Tensor]:
        first, images = batch
        objective, device = self.recipe.dvae.objective, self.group.device
        enlarged_from = objective.perceptual.enlarged_from
        kl_weight, temperature = ramp(objective.kl_weight, step), ramp(objective.temperature, step)
        rows = range(first, first + len(images))
        dtype = DTYPES[self.recipe.dvae.precision]
        # Autocast runs convolutions in 16 bit, except those that give logits or the likelihood's parameters.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = dvae_loss(
                self.model,
                send(images, device),
                LossSettings(
                    kl_weight=kl_weight,
                    marginal_kl_weight=ramp(objective.marginal_kl_weight, step),
                    temperature=temperature,
                    eps=objective.logit_laplace_eps,
                    ln_b_floor=objective.ln_b_floor,
                    estimator=objective.estimator,
                    reinforce_samples=objective.reinforce_samples,
                    perceptual_weight=objective.perceptual.weight,
                    enlarged=enlarged_from is not None and step >= enlarged_from,
                ),
                [torch_generator(self.recipe.seed, "dvae", step, row, device=device) for row in rows],
                self._batch_mean if self.group.size > 1 else None,
                self.perceptual,
            )
        return {
            "loss": found.loss,
            "recon_nll": found.recon_nll,
            "kl": found.kl,
            "kl_per_position": found.kl_per_position,
            "elbo": found.elbo,
            "perceptual": found.perceptual,
            "kl_weight": torch.tensor(kl_weight),
            "temperature": torch.tensor(temperature),
            "replaced": torch.tensor(self._replaced),
        }

    def validate(self, step: int) -> dict[str, float]:
        if self.validation_images is None:
            return {}
        objective, seed, device = self.recipe.dvae.objective, self.recipe.seed, self.group.device
        size = self.recipe.dvae.training.micro_batch or VALIDATION_BATCH
        metrics = []
        for first in range(0, len(self.validation_images), size):
            part = self.validation_images[first : first + size].to(device)
            rows = range(first, first + len(part))
            noise = [torch_generator(seed, "dvae validation", row, device=device) for row in rows]
            metrics.append(
                validation_metrics(
                    self.model,
                    part,
                    objective.logit_laplace_eps,
                    objective.ln_b_floor,
                    noise,
                    self.perceptual,
                    # From the first update on, so that all validations are comparable.
                    enlarged=objective.perceptual.enlarged_from is not None,
                )
            )
        summary = merge_metrics(metrics).summary()
        loss = summary["recon_nll"] + objective.perceptual.weight * summary["perceptual"]
        return {"loss": loss, **summary}

    def example_images(self) -> dict[str, Tensor]:
        """Return a grid of originals, each with its reconstruction to the right, two pairs a row."""
        if self.validation_images is None:
            return {}
        eps = self.recipe.dvae.objective.logit_laplace_eps
        originals = self.validation_images[:EXAMPLES]
        mu, _ = self.model(encoder_input(originals.to(self.group.device), eps))
        pairs = torch.stack([originals, reconstructed_images(mu, eps).cpu()], dim=1).flatten(0, 1)
        return {"reconstructions": picture_grid(pairs, columns=4)}

    def decayed(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.ndim > 1}

    def after_update(self) -> None:
        """Do nothing: the dVAE's weights are unconstrained."""

    def _batch_mean(self, own: Tensor) -> Tensor:
        """Return the mean over the whole batch, given this rank's mean over its own part."""
        whole = self.recipe.dvae.training.batch_size
        part = self.group.part(whole)
        return self.group.sum(own * ((part.stop - part.start) / whole))

    @cached_property
    def validation_images(self) -> Tensor | None:
        """The first held-out images that can be read, (n, S, S, 3) uint8, or None if there are none."""
        images = []
        for row in self.held_out[: self.recipe.dvae.training.validation_samples]:
            try:
                images.append(load_eval_picture(self.source, int(row), self.recipe.image_size, self.recipe.data))
            except (BadSample, BadImage):
                continue
        return torch.from_numpy(np.stack(images)) if images else None


def train_dvae(recipe: Recipe, source: Source, out: Path, extend: int | None = None) -> Checkpoint:
    """Train the recipe's dVAE on ``source`` into the run's folder ``out``, or resume the run that is there.

    ``extend`` is the number of updates to add to a finished run; see ``Run``.

    Raises:
        UserError: no image that was tried can be read; the checkpoint that it begins from does not fit; or see
            ``Run.train``.
    """
    _refuse_unreadable(source, recipe)
    ancestor = open_ancestor(recipe, "dvae", out, SAME)
    with join_group(recipe.device) as group:
        recipe = settle_precision(recipe, "dvae", out, group, lambda tried: dvae_update(tried, source, group.device))
        require_precision("dvae.precision", recipe.dvae.precision, group.device)
        task = build_task(recipe, source, group)
        model = task.model
        if ancestor is not None:
            task.belongs["init"] = ancestor.identity
            ancestor.load_into(model)
        if group.device.type == "cuda" and recipe.compile == "auto":
            use_settings(recipe)  # which compiled code depends on
            with explain_out_of_memory(out, task.less_memory):
                compile_networks(model, recipe.image_size, DTYPES[recipe.dvae.precision], group.device)
        loss_scaler = torch.amp.GradScaler(group.device.type) if recipe.dvae.precision == "fp16" else None
        return Run(task, recipe, out, Replicated(model, group, loss_scaler=loss_scaler), extend).train()


def dvae_update(recipe: Recipe, source: Source, device: torch.device) -> Update:
    """Return a function that makes an update of a fresh dVAE on random pictures, for timing."""
    task, side = build_task(recipe, source, Group(device=device)), recipe.image_size
    pictures = torch.randint(256, (recipe.dvae.training.batch_size, side, side, 3), dtype=torch.uint8)
    engine = Replicated(task.model, task.group)
    return trial_update(recipe, "dvae", engine, task.decayed(), lambda size: task.loss((0, pictures[:size]), 0)["loss"])


def build_task(recipe: Recipe, source: Source, group: Group = ALONE) -> DvaeTask:
    """Return the training of the recipe's dVAE on ``source``, with its initial weights on the group's device."""
    model = DVAE(recipe.dvae.model, seed=recipe.seed).to(memory_format=torch.channels_last).to(group.device)
    settings, distance, belongs = recipe.dvae.objective.perceptual, None, {"source": source.identity}
    if settings.weight:
        distance = PerceptualDistance(settings.network).to(group.device)
        belongs["perceptual"] = weights_hash(distance)
    return DvaeTask(recipe, source, model, group, belongs, perceptual=distance)


def compile_networks(
    model: DVAE,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Have ``model`` train through ``torch.compile`` if a trial on one picture comes to the same values.

    ``dtype`` is that of autocast, which 32 bit does without.
    """
    prepare_compiler()
    parameters = list(model.parameters())
    generator = torch.Generator(device).manual_seed(0)
    x = torch.rand(1, CHANNELS, image_size, image_size, device=device, generator=generator) * 0.8 + 0.1
    gradients = [torch.randn(x.shape, device=device, generator=generator) for _ in range(2)]

    def output_and_gradients() -> list[Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model.decoder(model.encoder(x).softmax(1))
        return [*outputs, *torch.autograd.grad(outputs, parameters, gradients)]

    def compiled() -> list[Tensor]:
        model.encoder.compiled = torch.compile(model.encoder.plain, dynamic=False, backend=backend)
        model.decoder.compiled = torch.compile(model.decoder.plain, dynamic=False, backend=backend)
        return output_and_gradients()

    if not agrees("train-dvae: encoder and decoder by torch.compile", output_and_gradients, compiled):
        model.encoder.compiled = model.decoder.compiled = None


def load_dvae(checkpoint: Checkpoint) -> DVAE:
    """Load the dVAE of a checkpoint with its EMA weights, ready for encoding and decoding."""
    model = DVAE(checkpoint.recipe().dvae.model)
    checkpoint.load_into(model)
    model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def find_dvae(path: Path, identity: str) -> Checkpoint | None:
    """Return the checkpoint with this hash: the one at ``path``, or the best or the newest of the run there."""
    which: tuple[Which, ...] = ("best", "last")
    found = (open_checkpoint(path, "dvae", each) for each in which)
    return next((checkpoint for checkpoint in found if checkpoint.identity == identity), None)


def _refuse_unreadable(source: Source, recipe: Recipe) -> None:
    """Raise UserError if none of about 100 rows can be read, before workers start."""
    reason = ""
    # Rows are spread out, since the first ones may all be filtered.
    for row in range(0, len(source), max(1, len(source) // 100)):
        try:
            load_eval_picture(source, row, recipe.image_size, recipe.data)
        except (BadSample, BadImage) as error:
            reason = reason or f"{source.key(row)}: {error}"
        else:
            return
    raise UserError(f"{source.name}: no image that was tried can be used ({reason}); name a source of readable images")
