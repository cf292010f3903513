"""A naive prior: dense attention with a mask, and logits for all positions at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.config.layout import AttentionKind
from dalle_cli.prior.attention import raster_offsets
from dalle_cli.prior.model import AttentionResblock, Prior


def mask_of(kind: AttentionKind, text: int, grid: int, kernel: int) -> Tensor:
    """Return the attention mask (T + S, T + S), true where a query (row) attends to a key (column)."""
    length = text + grid**2
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    position = torch.arange(grid**2)
    offsets = torch.tensor(raster_offsets(kind, grid, kernel))
    mask[text:, text:] = torch.isin(position[:, None] - position, offsets)
    return mask


def make_naive(prior: Prior) -> Prior:
    """Replace the attention of ``prior``, in place, by dense attention with a mask, and return it."""
    for block in prior.resblocks:
        if isinstance(block, AttentionResblock):
            mask = mask_of(block.kind, block.text_length, block.grid, block.conv_kernel)
            setattr(block, "branch", _branch(block, mask.to(block.qkv.weight.device)))  # noqa: B010
    return prior


def naive_loss(prior: Prior, text: Tensor, image: Tensor) -> Tensor:
    """Return 1/8 of the text loss of captions (B, T) without padding plus 7/8 of the image loss of images (B, S)."""
    hidden = prior(text, image)
    text_logits, image_logits = prior.text_logits(hidden), prior.image_logits(hidden)
    return (
        F.cross_entropy(text_logits.flatten(0, 1), text[:, 1:].flatten()) / 8
        + F.cross_entropy(image_logits.flatten(0, 1), image.flatten()) * 7 / 8
    )


def _branch(block: AttentionResblock, mask: Tensor) -> Callable[[Tensor], Tensor]:
    norm, qkv, out = block.norm, block.qkv, block.out

    def branch(x: Tensor) -> Tensor:
        q, k, v = qkv(norm(x)).unflatten(-1, (3, block.heads, -1)).transpose(1, 3).unbind(2)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        return out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    return branch
