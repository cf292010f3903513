"""Decoding token by token with caches that hold only what each attention can still read.

The text is run once for each caption; its keys and values serve all samples of the caption without a copy.
Image keys and values live in slots: a ring for ``row`` (grid + 1) and ``conv`` (largest offset + 1), a slot
for each position, grouped by column, for ``column``, and in order for ``full``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.prior.attention import raster_offsets
from dalle_cli.prior.transformer import AttentionResblock, MlpResblock, Prior
from dalle_cli.recipes.layout import AttentionKind


@dataclass(frozen=True)
class Slots:
    """Where one kind of attention keeps the keys of image positions."""

    kind: AttentionKind
    grid: int
    conv_kernel: int

    @property
    def count(self) -> int:
        """Slots a sample and layer."""
        if self.kind in ("row", "conv"):
            return raster_offsets(self.kind, self.grid, self.conv_kernel)[-1] + 1
        return self.grid**2

    def write(self, position: int) -> int:
        """The slot that ``position`` goes to."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return column * self.grid + row
        return position % self.count

    def read(self, position: int) -> slice | list[int]:
        """The slots that ``position`` attends to, itself included."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return slice(column * self.grid, column * self.grid + row + 1)
        if self.kind == "conv":
            offsets = raster_offsets(self.kind, self.grid, self.conv_kernel)
            return [(position - d) % self.count for d in offsets if d <= position]
        return slice(0, min(position + 1, self.count))


@dataclass
class LayerCache:
    """Keys and values of one layer: text (C, H, T, D), and image (C, n, H, slots, D)."""

    slots: Slots
    text_k: Tensor
    text_v: Tensor
    image_k: Tensor
    image_v: Tensor


@dataclass
class Cache:
    """C captions with n samples each.

    ``logits`` (C, V_image) are those of the first image token; ``layers`` are first layer first.
    """

    logits: Tensor
    layers: list[LayerCache]

    def fork(self, n: int) -> Cache:
        """n samples a caption that go on from the one sample here; text is shared, image slots are copied.

        Raises:
            ValueError: there is more than one sample a caption already.
        """
        if any(layer.image_k.shape[1] != 1 for layer in self.layers):
            raise ValueError("a cache can be forked only while it holds one sample a caption")
        layers = [
            LayerCache(
                layer.slots,
                layer.text_k,
                layer.text_v,
                layer.image_k.repeat(1, n, 1, 1, 1),
                layer.image_v.repeat(1, n, 1, 1, 1),
            )
            for layer in self.layers
        ]
        return Cache(self.logits, layers)


def _layers(prior: Prior) -> Iterator[tuple[AttentionResblock, MlpResblock]]:
    blocks = list(prior.resblocks)
    for attention, mlp in zip(blocks[::2], blocks[1::2], strict=True):
        if not isinstance(attention, AttentionResblock) or not isinstance(mlp, MlpResblock):
            raise TypeError("resblocks must alternate attention and perceptron")
        yield attention, mlp


@torch.no_grad()
def prefill(prior: Prior, text_ids: Tensor) -> Cache:
    """Run the text ids (C, T), with paddings, once. The cache holds one sample a caption: see ``fork``."""
    if text_ids.shape[-1] != prior.text_length:
        raise ValueError(f"text has {text_ids.shape[-1]} positions, the prior {prior.text_length}")
    x = prior.embed_text(text_ids)
    layers = []
    for attention, mlp in _layers(prior):
        q, k, v = attention.heads_of(x)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = mlp(x + attention.out(mixed.transpose(1, 2).flatten(2)))
        slots = Slots(attention.kind, attention.grid, attention.conv_kernel)
        captions, heads, _, width = k.shape
        image_k, image_v = (k.new_zeros(captions, 1, heads, slots.count, width) for _ in range(2))
        layers.append(LayerCache(slots, k.contiguous(), v.contiguous(), image_k, image_v))
    return Cache(prior.image_head(prior.norm(x[:, -1])), layers)


@torch.no_grad()
def step(prior: Prior, cache: Cache, position: int, token: Tensor) -> Tensor:
    """Put ``token`` (C, n) at image position ``position``; returns logits (C, n, V_image) of the next.

    Positions must come in order, from 0; ``position`` is at most S - 2.
    """
    if not 0 <= position < prior.image_length - 1:
        raise ValueError(f"position {position} has no successor in an image of {prior.image_length} tokens")
    x = prior.embed_image_token(token, position)
    for (attention, mlp), layer in zip(_layers(prior), cache.layers, strict=True):
        q, k, v = (y.squeeze(-2) for y in attention.heads_of(x[..., None, :]))
        slot = layer.slots.write(position)
        layer.image_k[..., slot, :] = k
        layer.image_v[..., slot, :] = v
        x = mlp(x + attention.out(_attend_slots(q, layer, layer.slots.read(position)).flatten(-2)))
    return prior.image_head(prior.norm(x))  # type: ignore[no-any-return]


def _attend_slots(q: Tensor, layer: LayerCache, readable: slice | list[int]) -> Tensor:
    """Queries (C, n, H, D) to [text | readable slots]; returns (C, n, H, D)."""
    image_k, image_v = layer.image_k[..., readable, :], layer.image_v[..., readable, :]
    q = q / math.sqrt(q.shape[-1])
    to_text = (q.transpose(1, 2) @ layer.text_k.transpose(-1, -2)).transpose(1, 2)
    to_image = (image_k @ q[..., None])[..., 0]
    text = to_text.shape[-1]
    weights = torch.cat([to_text, to_image], dim=-1).softmax(-1)
    from_text = (weights[..., :text].transpose(1, 2) @ layer.text_v).transpose(1, 2)
    return from_text + (weights[..., None, text:] @ image_v)[..., 0, :]
