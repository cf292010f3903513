"""Pictures that a prior draws for the same held-out captions at each validation, so that its progress can be seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import device_for_doubles
from dalle_cli.dvae.encode import decode_tokens
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import find_dvae, load_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior
from dalle_cli.prior.train import Drawing, TokenBatch
from dalle_cli.progress import log
from dalle_cli.randomness import numpy_generator
from dalle_cli.sampling.draw import sample_images
from dalle_cli.stores.places import Place
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.training.picture_grid import picture_grid


@dataclass
class Drawings:
    """Draws one sample of each of the first ``prior.drawings`` captions of a batch, below their own pictures."""

    recipe: Recipe
    dvae: DVAE
    eps: float
    """``logit_laplace_eps`` of the dVAE."""

    def __call__(self, prior: Prior, batch: TokenBatch) -> Tensor:
        """Return pictures (3, H, W) uint8: a row of what ``batch`` decodes to, and a row of drawn ones.

        The drawn ones depend on the weights, the recipe's seed and settings of sampling alone.
        """
        some = slice(self.recipe.prior.drawings)
        device = next(prior.parameters()).device
        text, length, image = (part[some].to(device) for part in (batch.text, batch.length, batch.image))
        ids = prior.with_padding(text, length)
        empty = prior.with_padding(torch.zeros_like(text[:1]), torch.zeros_like(length[:1]))[0]
        uniforms = [
            numpy_generator(self.recipe.seed, "drawing", i).random((1, image.shape[1])) for i in range(len(text))
        ]
        settings = self.recipe.sampling.model_copy(update={"batch_size": None})
        if not self.recipe.prior.caption_dropout:
            settings = settings.model_copy(update={"guidance": 1.0})
        self.dvae.to(device)
        decoder = Decoder(prior, "bf16" if settings.precision == "bf16" else "fp32")
        numbers = torch.from_numpy(np.stack(uniforms)).to(device_for_doubles(device))
        drawn, _ = sample_images(decoder, ids, numbers, settings, empty=empty)
        grids = torch.cat([image, drawn[:, 0]]).unflatten(1, (decoder.grid, decoder.grid))
        pictures = decode_tokens(self.dvae, grids, self.eps).cpu()
        self.dvae.to("cpu")
        return picture_grid(pictures, columns=len(text))


def held_out_drawing(recipe: Recipe, store: Place, dvae: Path) -> Drawing | None:
    """Return what draws at a prior's validations; None if ``prior.drawings`` is 0 or there is no dVAE to decode with.

    ``dvae`` is a checkpoint or run of the dVAE that encoded ``store``.
    """
    if not recipe.prior.drawings:
        return None
    if recipe.prior.sharding.zero:
        log("train-prior: a sharded prior draws nothing at validations (prior.drawings)")
        return None
    identity = str(TokenReader(store).part("image").identity["dvae"])
    try:
        checkpoint = find_dvae(dvae, identity)
    except UserError:  # there is none
        checkpoint = None
    if checkpoint is None:
        log(f"{dvae}: is not the dVAE that encoded {store}, so nothing is drawn at validations; name it with --dvae")
        return None
    return Drawings(recipe, load_dvae(checkpoint), checkpoint.recipe().dvae.objective.logit_laplace_eps)
