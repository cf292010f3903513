"""Training that begins from the weights of an earlier checkpoint, its ancestor: ``dvae.init`` and its like.

The ancestor's EMA weights are the initial ones; moments begin at zero and schedules at their start. Models must have
the same sizes, except for captions: tokens and text positions that both models have are carried over, and new ones
begin as in a training from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from dalle_cli.config.run_folders import RunFolders, run_of
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.progress import log
from dalle_cli.stores.checkpoint import Checkpoint, Kind, open_stage, steps_in


def open_ancestor(recipe: Recipe, kind: Kind, out: Path, same: tuple[str, ...]) -> Checkpoint | None:
    """Open the checkpoint that the recipe's ``kind`` of model begins from.

    Return None if the recipe names none, or if the run in ``out`` has begun, since it resumes from its own checkpoint.

    Raises:
        UserError: there is no checkpoint, or a setting of ``same`` differs between its recipe and this one.
    """
    init: str | None = getattr(recipe, kind).init
    if init is None or steps_in(out):
        return None
    ancestor = open_stage(Path(init), kind)
    then = ancestor.recipe()
    for key in same:
        old, new = attrgetter(key)(then), attrgetter(key)(recipe)
        if old != new:
            raise UserError(
                f"{kind}.init: {ancestor.path} was trained with {key} = {old!r}, the recipe says {new!r}; "
                f"make them agree, or leave out {kind}.init"
            )
    log(f"{out}: begins from {ancestor.path}, which made {ancestor.step} updates")
    return ancestor


@dataclass(frozen=True)
class SharedText:
    """Tokens and text positions that a model and its ancestor have in common."""

    new_ids: Tensor
    """(n,) ids of the shared tokens in the model's tokenizer, int64."""
    old_ids: Tensor
    """(n,) ids of the same tokens in the ancestor's tokenizer."""
    positions: int
    """Number of text positions that both have."""
    old_vocab: int
    """Number of BPE tokens of the ancestor's model."""


def shared_text(ancestor: Checkpoint, recipe: Recipe, tokenizer: str) -> SharedText:
    """Return what the recipe's model shares with its ancestor; ``tokenizer`` is the hash of the model's tokenizer.

    Raises:
        UserError: the tokenizers differ, and one of them is not in its run's folder.
    """
    then = ancestor.recipe().tokenizer
    positions = min(then.text_length, recipe.tokenizer.text_length)
    if ancestor.belongs.get("tokenizer") == tokenizer:
        ids = torch.arange(min(then.vocab_size, recipe.tokenizer.vocab_size))
        return SharedText(ids, ids, positions, then.vocab_size)
    old = _vocabulary(run_of(ancestor.path).tokenizer, ancestor.belongs.get("tokenizer", ""), str(ancestor.path))
    new = _vocabulary(RunFolders(Path(recipe.run)).tokenizer, tokenizer, "the token store")
    shared = sorted((new[token], old[token]) for token in new.keys() & old.keys())
    log(f"{ancestor.path}: has another tokenizer; {len(shared)} of {len(new)} tokens are carried over")
    new_ids, old_ids = torch.tensor(shared, dtype=torch.int64).reshape(-1, 2).T
    return SharedText(new_ids, old_ids, positions, then.vocab_size)


def _vocabulary(folder: Path, identity: str, user: str) -> dict[str, int]:
    from dalle_cli.text.bpe import Tokenizer

    tokenizer = Tokenizer.load(folder)
    if tokenizer.identity != identity:
        raise UserError(f"{folder}: is not the tokenizer {identity[:12]} of {user}; put that one there")
    return tokenizer.backend.get_vocab()


def carry_rows(values: Tensor, new_rows: Tensor, old: Tensor, old_rows: Tensor) -> Tensor:
    """Return a copy of ``values`` (N, ...) with rows ``old_rows`` of ``old`` (M, ...) at ``new_rows``."""
    values = values.clone()
    values[new_rows] = old[old_rows].to(values.dtype)
    return values
