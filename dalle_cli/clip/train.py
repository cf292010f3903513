"""Training of a small CLIP on the prior's pictures and captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dalle_cli.clip.hard_negatives import HardNegativeOrder
from dalle_cli.clip.model import (
    build_clip,
    clamp_logit_scale,
    clip_text_ids,
    contrastive_loss,
    pairs_cross_entropy,
    pixels,
)
from dalle_cli.config.schema import ClipModel, Recipe
from dalle_cli.data.batch_order import Order
from dalle_cli.data.images import BadImage
from dalle_cli.data.picture_loader import TrainingPictures, load_eval_picture
from dalle_cli.data.source import BadSample, Source
from dalle_cli.distributed.device import choose_device, prepare_process
from dalle_cli.distributed.engine import Replicated
from dalle_cli.distributed.group import ALONE, Group
from dalle_cli.distributed.launch import read_launch
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import Checkpoint, Kind, open_checkpoint, steps_in
from dalle_cli.stores.held_out import split_store
from dalle_cli.stores.places import Place
from dalle_cli.stores.tensor_files import require_like
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.training_captions import TrainingCaptions
from dalle_cli.training.ancestor import carry_rows, open_ancestor, shared_text
from dalle_cli.training.loop import Run
from dalle_cli.training.picture_grid import picture_grid
from dalle_cli.training.precision_choice import Update, trial_update
from dalle_cli.training.throughput import SampleWork, training_flops
from dalle_cli.transfers import send

if TYPE_CHECKING:
    from open_clip.model import CLIP

SHOWN_CAPTIONS, SHOWN_RANKS = 8, 3
"""Numbers of held-out captions shown at a validation, and of pictures that the model ranks highest for each."""
SAME = ("image_size", *(f"clip.model.{key}" for key in ClipModel.model_fields))
"""Settings in which a CLIP may not differ from the one that it begins from."""


@dataclass
class ClipTask:
    """Training of the contrastive loss on batches of (picture, caption); pictures are cropped but never flipped."""

    recipe: Recipe
    source: Source
    reader: TokenReader
    model: CLIP
    group: Group = ALONE
    belongs: dict[str, str] = field(default_factory=dict)
    kind: Kind = "clip"
    comparable_from: int = 0
    judged_by: str = "loss"
    less_memory: str = "lower clip.training.batch_size"

    def __post_init__(self) -> None:
        self.training_rows, self.held_out = split_store(self.reader, self.recipe)
        self.captions = TrainingCaptions(self.reader)
        self._vocab = self.recipe.tokenizer.vocab_size
        self._logits, self._replaced = torch.zeros(0, 0), 0.0

    def work(self) -> SampleWork:
        side, length = self.recipe.image_size, self.recipe.tokenizer.text_length
        with torch.device("meta"):
            model = build_recipe_clip(self.recipe, pretrained=False)
            images, text = torch.empty(1, 3, side, side), torch.zeros(1, model.context_length, dtype=torch.long)
        patches = (side // self.recipe.clip.model.patch_size) ** 2
        return SampleWork(patches + length, training_flops(lambda: model(images, text)))

    def batches(self, start: int, stop: int, order: Order = "random blocks") -> Iterator[tuple[Tensor, Tensor]]:
        training = self.recipe.clip.training
        pictures = TrainingPictures(
            self.source,
            self.training_rows,
            self.recipe.image_size,
            self.recipe.data,
            self.recipe.seed,
            training.batch_size,
            flip=False,
            workers=training.workers,
        )
        group_size = self.recipe.clip.objective.hard_negatives
        reorder = HardNegativeOrder(self.reader, group_size) if group_size > 1 else None
        for batch in pictures.batches(start, stop, order, reorder):
            self._replaced = batch.replaced
            yield batch.pictures, self._text_ids(*self.captions.read(batch.rows, batch.epochs))

    def micro_batches(self, batch: Any, size: int | None) -> list[tuple[Any, float]]:
        if size is not None and size != len(batch[0]):
            raise UserError(
                "clip.training.micro_batch: the contrastive loss needs its whole batch at once; leave it out"
            )
        return [(batch, 1.0)]

    def loss(self, batch: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        images, text_ids = (send(part, self.group.device) for part in batch)
        caption_negatives = self.recipe.clip.objective.caption_negatives
        loss = contrastive_loss(self.model, pixels(images), text_ids, caption_negatives)
        return {"loss": loss, "replaced": torch.tensor(self._replaced)}

    def validate(self, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        images, text_ids = (part.to(self.group.device) for part in self.validation)
        image_features, text_features, scale = self.model(pixels(images), text_ids)
        logits = scale * image_features @ text_features.T
        self._logits = logits.cpu()
        loss = pairs_cross_entropy(logits, logits.T)
        # An equal caption scores as high as the picture's own, so ties count as right.
        recall = (logits >= logits.diagonal()[:, None] + 1e-4).sum(dim=1).eq(0).float().mean()
        return {"loss": float(loss), "caption_recall_at_1": float(recall)}

    def example_images(self) -> dict[str, Tensor]:
        """Return a sheet with a column for each of the first held-out captions.

        Its own picture is at the top, and below are those that the model of the last validation ranks highest for it.
        """
        if self.validation is None:
            return {}
        pictures = self.validation[0]
        columns, ranks = min(SHOWN_CAPTIONS, len(pictures)), min(SHOWN_RANKS, len(pictures))
        ranked = self._logits[:, :columns].topk(ranks, dim=0).indices
        shown = pictures[torch.cat([torch.arange(columns), ranked.flatten()])]
        return {"retrieval": picture_grid(shown, columns)}

    def decayed(self) -> set[str]:
        return decayed_parameters(self.model)

    def after_update(self) -> None:
        clamp_logit_scale(self.model)

    @cached_property
    def validation(self) -> tuple[Tensor, Tensor] | None:
        pictures, rows = [], []
        for row in self.held_out[: self.recipe.clip.training.validation_samples]:
            try:
                pictures.append(load_eval_picture(self.source, int(row), self.recipe.image_size, self.recipe.data))
            except (BadSample, BadImage):
                continue
            rows.append(int(row))
        if not rows:
            return None
        return torch.from_numpy(np.stack(pictures)), self._text_ids(
            self.reader.read("text", np.array(rows)), self.reader.read("text_length", np.array(rows))
        )

    def _text_ids(self, text: np.ndarray, length: np.ndarray) -> Tensor:
        text_tensor, length_tensor = (torch.from_numpy(values.astype(np.int64)) for values in (text, length))
        return clip_text_ids(text_tensor, length_tensor, self._vocab)


def train_clip(recipe: Recipe, source: Source, store: Place, out: Path, extend: int | None = None) -> Checkpoint:
    """Train the recipe's CLIP on the source's pictures and the store's captions; ``out`` is the run's folder.

    ``extend`` is the number of updates to add to a finished run; see ``Run``.

    Raises:
        UserError: see ``Run.train``; or the store was made from another source, there is more than one rank, or ``out``
            has a CLIP of an earlier version.
    """
    if (processes := read_launch().size) > 1:
        raise UserError(
            f"train-clip: runs in one process, not in {processes}, since the contrastive loss needs the whole batch; "
            "start it without torchrun"
        )
    reader = TokenReader(store)
    reader.require_complete()
    text = reader.part("text").identity
    if text["source"] != source.identity:
        raise UserError(
            f"{store}: was made from {text['source_name']}, and {source.name} holds other files (by their names and "
            "sizes); give the source it came from"
        )
    if text["text_length"] != recipe.tokenizer.text_length or text["vocab_size"] > recipe.tokenizer.vocab_size:
        raise UserError(f"{store}: was made with another tokenizer.text_length or vocab_size than the recipe's")
    belongs = {"tokenizer": text["tokenizer"], "source": source.identity}
    if recipe.clip.objective.hard_negatives > 1:
        belongs["dvae"] = reader.part("image").identity["dvae"]
    if steps_in(out):
        # Refuses a CLIP of an earlier version before it is trained further.
        load_clip(open_checkpoint(out, "clip", "last"))
    device = choose_device(recipe.device)
    prepare_process(device)
    model = build_recipe_clip(recipe)
    if (ancestor := open_ancestor(recipe, "clip", out, SAME)) is not None:
        belongs["init"] = ancestor.identity
        begin_from(model, ancestor, recipe, text["tokenizer"])
    task = ClipTask(recipe, source, reader, model.to(device), Group(device=device), belongs)
    return Run(task, recipe, out, extend=extend).train()


def clip_update(recipe: Recipe, device: torch.device) -> Update:
    """Return a function that makes an update of a fresh CLIP on random pictures and captions, for timing."""
    model, side, tokenizer = build_recipe_clip(recipe).to(device), recipe.image_size, recipe.tokenizer
    size = recipe.clip.training.batch_size
    pictures = torch.randint(256, (size, side, side, 3), dtype=torch.uint8, device=device)
    text = torch.randint(tokenizer.vocab_size, (size, tokenizer.text_length + 1), device=device)
    text[:, -1] = tokenizer.vocab_size
    negatives = recipe.clip.objective.caption_negatives
    engine = Replicated(model, Group(device=device))

    def loss(samples: int) -> Tensor:
        return contrastive_loss(model, pixels(pictures[:samples]), text[:samples], negatives)

    return trial_update(recipe, "clip", engine, decayed_parameters(model), loss)


def decayed_parameters(model: CLIP) -> set[str]:
    """Return the names of the parameters that weight decay applies to: matrices that are no embeddings."""
    return {name for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name}


def begin_from(model: CLIP, ancestor: Checkpoint, recipe: Recipe, tokenizer: str) -> None:
    """Load the weights of another CLIP into a new one, whose ``tokenizer`` has this hash.

    Rows of tokens and text positions are carried over as far as both have them, all else as it is.
    """
    text, old, new = shared_text(ancestor, recipe, tokenizer), ancestor.tensors("ema"), model.state_dict()
    end, positions = torch.tensor([0]), torch.arange(text.positions + 1)
    rows = {
        "positional_embedding": (positions, positions),
        "token_embedding.weight": (
            torch.cat([text.new_ids, recipe.tokenizer.vocab_size + end]),
            torch.cat([text.old_ids, text.old_vocab + end]),
        ),
    }
    for name, (new_rows, old_rows) in rows.items():
        old[name] = carry_rows(new[name], new_rows, old[name], old_rows)
    model.load_state_dict(old)


def build_recipe_clip(recipe: Recipe, *, pretrained: bool = True) -> CLIP:
    """Build the recipe's CLIP with its initial weights; those of a pretrained network are loaded if ``pretrained``."""
    return build_clip(
        recipe.clip.model,
        recipe.image_size,
        recipe.tokenizer.text_length,
        recipe.tokenizer.vocab_size,
        seed=recipe.seed,
        pretrained=pretrained,
    )


def load_clip(checkpoint: Checkpoint) -> CLIP:
    """Load the EMA weights of a CLIP checkpoint for scoring.

    Raises:
        UserError: the checkpoint is damaged, or of an earlier version with learned image positions.
    """
    recipe, weights = checkpoint.recipe(), checkpoint.tensors("ema")
    model = build_recipe_clip(recipe, pretrained=False)
    require_like(weights, model.state_dict(), checkpoint.files_of("ema").whole)
    # Not compared bit for bit, since the last bit of a sine depends on the processor.
    if recipe.clip.model.vision is None and not torch.allclose(
        weights["visual.positional_embedding"], model.visual.positional_embedding, atol=1e-3
    ):
        raise UserError(
            f"{checkpoint.path}: is a CLIP of an earlier version of dalle; delete {checkpoint.path.parent} and run "
            "dalle train-clip again"
        )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)
