"""Decoding token by token, with key-value caches that hold only what each kind of attention can still read.

The text and the given image tokens run once per caption, and all samples of the caption share the text's keys and
values. Image keys and values are stored in slots: a ring buffer for ``row`` (grid + 1 slots) and ``conv`` (largest
offset + 1), and one slot per position for ``full`` and, grouped by column, for ``column``. A step reads slots without
copying them. ``conv``, whose window is not contiguous, reads its whole ring with a bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.config.layout import AttentionKind
from dalle_cli.precision.formats import DTYPES
from dalle_cli.prior.attention import attend, raster_offsets
from dalle_cli.prior.cpu_kernels import Precision, packed, skinny_bmm
from dalle_cli.prior.model import AttentionResblock, MlpResblock, Prior
from dalle_cli.transfers import send

POSITIONS_PER_PASS = 2**13
"""Number of positions over all captions that ``prefill`` runs together; enough to use the processor fully."""


@dataclass(frozen=True)
class Slots:
    """The slots where one kind of attention stores the keys and values of image positions."""

    kind: AttentionKind
    grid: int
    conv_kernel: int

    @property
    def count(self) -> int:
        """Number of slots per sample and layer."""
        if self.kind in ("row", "conv"):
            return raster_offsets(self.kind, self.grid, self.conv_kernel)[-1] + 1
        return self.grid**2

    def write(self, position: int) -> int:
        """Return the slot that ``position`` is written to."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return column * self.grid + row
        return position % self.count

    def read(self, position: int) -> slice:
        """Return the slots that ``position`` reads, its own included; ``conv`` masks some of them with ``bias``."""
        if self.kind == "column":
            row, column = divmod(position, self.grid)
            return slice(column * self.grid, column * self.grid + row + 1)
        return slice(0, min(position + 1, self.count))

    def bias(self) -> Tensor | None:
        """Return ``conv``'s mask (S, count), 0 where a position attends to a slot, else -inf; None for other kinds."""
        if self.kind != "conv":
            return None
        offsets = torch.tensor(raster_offsets(self.kind, self.grid, self.conv_kernel))
        position = torch.arange(self.grid**2)[:, None]
        age = (position - torch.arange(self.count)) % self.count
        allowed = torch.isin(age, offsets) & (age <= position)
        return torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf)


class TextCache(NamedTuple):
    """The text of C captions in one layer: keys (C, H, D, T), stored transposed, and values (C, H, T, D)."""

    keys: Tensor
    values: Tensor


@dataclass
class Cache:
    """The keys and values of n samples of each of C captions, by layer. A caption's samples share its text."""

    text: list[TextCache]
    image: list[Tensor]
    """(2, C, H, n, slots, D), keys and values of each sample."""


@dataclass
class Prefix:
    """The text and the given image tokens of C captions, which all samples of a caption share; lists are by layer."""

    logits: Tensor
    """(C, V_image), of the first image position that is not given."""
    text: list[TextCache]
    given: list[Tensor]
    """(2, C, H, G, D), keys and values of the last G given image tokens, as many as fit into the slots."""
    positions: int
    """Number of given image tokens."""
    slots: list[Slots]

    def captions(self, captions: slice) -> Prefix:
        """Return a view of some of the captions."""
        text = [TextCache(keys[captions], values[captions]) for keys, values in self.text]
        given = [layer[:, captions] for layer in self.given]
        return Prefix(self.logits[captions], text, given, self.positions, self.slots)

    def fork(self, n: int) -> Cache:
        """Return a cache of ``n`` samples per caption, which share the text and have separate image slots."""
        image = []
        for given, slots in zip(self.given, self.slots, strict=True):
            both, captions, heads, count, width = given.shape
            cache = given.new_empty(both, captions, heads, n, slots.count, width)
            if cache.is_cuda:
                cache.zero_()  # a CUDA graph reads slots before they are written
            written = [slots.write(p) for p in range(self.positions - count, self.positions)]
            places = send(torch.tensor(written, dtype=torch.long), cache.device)
            cache.index_copy_(-2, places, given[:, :, :, None].expand(-1, -1, -1, n, -1, -1))
            image.append(cache)
        return Cache(self.text, image)


class Layer:
    """One layer of the prior with packed matrices: attention of one kind, then the MLP."""

    def __init__(self, attention: AttentionResblock, mlp: MlpResblock, precision: Precision) -> None:
        self.slots = Slots(attention.kind, attention.grid, attention.conv_kernel)
        bias = self.slots.bias()
        self.bias = None if bias is None else bias.to(attention.qkv.weight.device, cache_type(precision))
        self.heads = attention.heads
        self.attention_norm, self.mlp_norm = attention.norm, mlp.norm
        self.qkv, self.out = packed(attention.qkv, precision), packed(attention.out, precision)
        self.up, self.down = packed(mlp.up, precision, gelu=True), packed(mlp.out, precision)

    def heads_of(self, x: Tensor) -> Tensor:
        """Return queries, keys and values (C, A, 3, H, D) of the residual stream (C, A, d)."""
        return self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))  # type: ignore[no-any-return]

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Return the residual stream (C, A, d) after the layer, given the attention's result (C, A, H, D)."""
        x = x + self.out(mixed.flatten(2))
        return x + self.down(self.up(self.mlp_norm(x)))


class Decoder:
    """A prior with its weights laid out for decoding.

    It copies the prior's matrices and shares its other parameters. The resblocks' matrices and the caches are in
    ``precision``; the residual stream, norms, softmax sums and logits are always in 32 bit. int8 is the precision of
    the resblocks' matrices and the head's alone, and for CPUs.
    """

    def __init__(self, prior: Prior, precision: Precision = "fp32") -> None:
        self.text_length, self.image_length, self.grid = prior.text_length, prior.image_length, prior.model.grid
        self.text_embedding, self.text_position = prior.text_embedding.detach(), prior.text_position.detach()
        self.image_embedding = prior.image_embedding.detach()
        self.image_position = (prior.image_row[:, None] + prior.image_column).flatten(0, 1).detach()
        blocks = list(prior.resblocks)
        self.layers = []
        for attention, mlp in zip(blocks[::2], blocks[1::2], strict=True):
            if not isinstance(attention, AttentionResblock) or not isinstance(mlp, MlpResblock):
                raise TypeError("resblocks must alternate between attention and MLP")
            self.layers.append(Layer(attention, mlp, precision))
        self.norm, self.head = prior.norm, packed(prior.image_head, "int8" if precision == "int8" else "fp32")
        self.dtype, self.device = cache_type(precision), self.image_embedding.device

    @torch.inference_mode()
    def prefill(self, text_ids: Tensor, given: Tensor | None = None) -> Prefix:
        """Read text ids (C, T), with padding, and the first P < S image tokens ``given`` (C, P) in one pass."""
        if text_ids.shape[-1] != self.text_length:
            raise ValueError(f"the text has {text_ids.shape[-1]} positions, the prior takes {self.text_length}")
        if given is None:
            given = text_ids[:, :0]
        captions, positions = given.shape
        if positions >= self.image_length:
            raise ValueError(f"{positions} given tokens leave none of {self.image_length} to draw")
        prefix = self._empty_prefix(captions, positions)
        per_pass = max(1, POSITIONS_PER_PASS // (self.text_length + (self.image_length if positions else 0)))
        for first in range(0, captions, per_pass):
            part = slice(first, first + per_pass)
            self._fill(prefix.captions(part), text_ids[part], given[part])
        return prefix

    def _empty_prefix(self, captions: int, positions: int) -> Prefix:
        """Return an uninitialized prefix of ``captions`` captions and ``positions`` image tokens."""
        vocabulary, d_model = self.image_embedding.shape
        heads = self.layers[0].heads
        text, width = self.text_length, d_model // heads
        slots = [layer.slots for layer in self.layers]

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        return Prefix(
            torch.empty(captions, vocabulary, device=self.device),
            [TextCache(empty(captions, heads, width, text), empty(captions, heads, text, width)) for _ in slots],
            [empty(2, captions, heads, min(positions, layer.count), width) for layer in slots],
            positions,
            slots,
        )

    def _fill(self, prefix: Prefix, text_ids: Tensor, given: Tensor) -> None:
        text, positions = self.text_length, given.shape[1]
        x = F.embedding(text_ids, self.text_embedding) + self.text_position
        if positions:
            # Attention is causal, so the padding after the given tokens does not affect them.
            image = F.pad(given, (0, self.image_length - positions))
            x = torch.cat([x, F.embedding(image, self.image_embedding) + self.image_position], dim=1)
        for layer, text_kv, given_kv in zip(self.layers, prefix.text, prefix.given, strict=True):
            qkv = layer.heads_of(x)
            q, k, v = kv = qkv.permute(2, 0, 3, 1, 4)
            text_kv.keys.copy_(k[..., :text, :].mT)
            text_kv.values.copy_(v[..., :text, :])
            given_kv.copy_(kv[1:, ..., text + positions - given_kv.shape[3] : text + positions, :])
            if positions:
                mixed = attend(layer.slots.kind, qkv, text, self.grid, layer.slots.conv_kernel)
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
            x = layer.finish(x, mixed)
        prefix.logits.copy_(self.head(self.norm(x[:, text + positions - 1])))

    @torch.inference_mode()
    def step(self, cache: Cache, position: int, token: Tensor) -> Tensor:
        """Write ``token`` (C, n) at image position ``position`` and return the next position's logits (C, n, V_image).

        Positions, up to S - 2, must come in order, from the first that is not given.
        """
        if not 0 <= position < self.image_length - 1:
            raise ValueError(f"position {position} has no successor in an image of {self.image_length} tokens")
        x = F.embedding(token, self.image_embedding) + self.image_position[position]
        for layer, text, image in zip(self.layers, cache.text, cache.image, strict=True):
            q, _, _ = kv = layer.heads_of(x).permute(2, 0, 3, 1, 4)
            readable = layer.slots.read(position)
            image[..., layer.slots.write(position), :] = kv[1:]
            bias = None if layer.bias is None else layer.bias[position, readable]
            x = layer.finish(x, attend_slots(q, text, image[..., readable, :], bias))
        return self.head(self.norm(x))


def cache_type(precision: Precision) -> torch.dtype:
    """Return the type of keys and values."""
    return DTYPES["fp32" if precision == "int8" else precision]


def attend_slots(q: Tensor, text: TextCache, image: Tensor, bias: Tensor | None) -> Tensor:
    """Return the attention (C, n, H, D) of queries (C, H, n, D) to the text and to image slots (2, C, H, n, L, D).

    ``bias`` (L,) is added to the image's scores.
    """
    captions, heads, n, width = q.shape
    streams = captions * heads
    image_k, image_v = image.flatten(1, 3)
    if image.device.type == "cpu" and image.dtype != torch.float32:
        image_k = image_k.contiguous()  # oneDNN's 16-bit product would copy it anyway, in a slower layout
    q = (q * (1 / math.sqrt(width))).contiguous().view(streams, n, width)
    to_text = skinny_bmm(q, text.keys.flatten(0, 1))
    to_image = torch.bmm(q.view(streams * n, 1, width), image_k.mT).view(streams, n, -1)
    if bias is not None:
        to_image += bias
    weights = torch.cat([to_text, to_image], dim=-1).softmax(-1)
    for_text, for_image = weights.tensor_split([to_text.shape[-1]], -1)
    from_text = skinny_bmm(for_text, text.values.flatten(0, 1))
    from_image = skinny_bmm(for_image.flatten(0, 1)[:, None], image_v)
    mixed = from_text + from_image.view(streams, n, width)
    return mixed.view(captions, heads, n, width).transpose(1, 2)
