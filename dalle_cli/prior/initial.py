"""Initial values of a prior that does not begin wholly at random: from the dVAE's codebook, or from another prior."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dalle_cli.config.run_folders import RunFolders
from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.train import find_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.model import INIT_STD, InitialValue, normal_values
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Checkpoint
from dalle_cli.stores.places import Place
from dalle_cli.training.ancestor import carry_rows, open_ancestor, shared_text

SAME = tuple(f"prior.model.{key}" for key in ("layers", "heads", "d_head", "grid", "layout", "conv_kernel"))
"""Settings in which a prior may not differ from the one that it begins from."""


def initial_values(
    recipe: Recipe, belongs: dict[str, str], out: Path, store: Place, dvae: Path | None
) -> InitialValue | None:
    """Return the initial values of the recipe's prior; None if they are all random.

    ``belongs`` has the hashes of the store's tokenizer and dVAE, to which that of the prior's ancestor is added.

    Raises:
        UserError: the ancestor or the dVAE, which is ``dvae`` or that of the recipe's run, does not fit.
    """
    ancestor = open_ancestor(recipe, "prior", out, (*SAME, "dvae.model.codebook_size"))
    if ancestor is not None:
        belongs["init"] = ancestor.identity
        if ancestor.belongs.get("dvae") != belongs["dvae"]:
            log(f"{ancestor.path}: was trained on the image tokens of another dVAE; codes are carried over by number")
        return from_prior(ancestor, recipe, belongs["tokenizer"])
    if recipe.prior.image_embedding == "codebook" and recipe.prior.init is None:
        codebook = read_codebook(dvae or RunFolders(Path(recipe.run)).dvae, belongs["dvae"], store)
        return from_codebook(codebook, recipe.prior.model.d_model, recipe.seed)
    return None


def from_prior(ancestor: Checkpoint, recipe: Recipe, tokenizer: str) -> InitialValue:
    """Return the values of another prior, for a model whose ``tokenizer`` has this hash.

    Rows of tokens, paddings and text positions are carried over as far as both priors have them, all else as it is.
    """
    text, vocab = shared_text(ancestor, recipe, tokenizer), recipe.tokenizer.vocab_size
    weights, positions = ancestor.checked_files_of("ema"), torch.arange(text.positions)
    padding = torch.tensor([0])
    rows = {
        "text_position": (positions, positions),
        "text_embedding": (
            torch.cat([text.new_ids, vocab + positions]),
            torch.cat([text.old_ids, text.old_vocab + positions]),
        ),
        **dict.fromkeys(
            ("text_head.weight", "text_head.bias"),
            (torch.cat([text.new_ids, vocab + padding]), torch.cat([text.old_ids, text.old_vocab + padding])),
        ),
    }

    def value(name: str, random: Tensor) -> Tensor:
        old = weights.read(name)
        return carry_rows(random, rows[name][0], old, rows[name][1]) if name in rows else old

    return value


def from_codebook(codebook: Tensor, d_model: int, seed: int) -> InitialValue:
    """Return random values, but for image tokens' embeddings and unembeddings: those are the projected codebook."""

    def value(name: str, random: Tensor) -> Tensor:
        is_code = name in ("image_embedding", "image_head.weight")
        return projected_codebook(codebook, d_model, seed) if is_code else random

    return value


def projected_codebook(codebook: Tensor, d_model: int, seed: int) -> Tensor:
    """Return embeddings (K, d_model) that are about as similar to each other as the vectors of ``codebook`` (K, n).

    They are the vectors around their mean, under a random projection that depends on ``seed``, with std 0.02.
    """
    centred = codebook.float() - codebook.float().mean(dim=0)
    projected = centred @ normal_values(torch.Size((codebook.shape[1], d_model)), 1.0, seed, "codebook")
    return projected * (INIT_STD / projected.std())


def read_codebook(dvae: Path, identity: str, store: Place) -> Tensor:
    """Return the codebook's vectors (K, n) of the dVAE that encoded ``store``, whose hash is ``identity``.

    Raises:
        UserError: ``dvae`` is another one.
    """
    checkpoint = find_dvae(dvae, identity)
    if checkpoint is None:
        raise UserError(
            f"{dvae}: is not the dVAE {identity[:12]} that encoded {store}; name it with --dvae, since "
            "prior.image_embedding: codebook starts from its vectors"
        )
    return checkpoint.tensors()["decoder.blocks.input.w"][:, :, 0, 0].t().float()
