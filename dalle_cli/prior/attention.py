"""Attention of the sparse transformer over whole streams (paper, section 2.2 and appendix B.1).

A stream has T text positions, then S = grid x grid image positions in raster order. A text position attends to the
text up to itself. An image position attends to all of the text and to some of the image positions up to itself,
depending on the kind of attention:

* ``row``: the previous ``grid`` positions, up to the one straight above;
* ``column``: the positions above it in its column;
* ``conv``: a causal k x k window, which wraps around at the ends of rows as ``row`` does;
* ``full``: all positions before it.

A kind is defined by its raster offsets, the allowed differences between the raster indices of query and key. One
softmax runs over text and image keys together. ``attend`` computes it anywhere, and ``prior/flex_attention.py``
computes the same faster on a GPU.

The sparse kinds compute only what they attend to, and some masked entries. The image is cut into blocks of rows; the
queries of a block share a window of keys, the block itself and the rows above it that they need. All products are
dense: queries x text, and blocks x windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dalle_cli.config.layout import AttentionKind

SMALL_IMAGE = 64
"""Number of image tokens up to which one block is as fast as several, because the number of products dominates."""
DENSE_IMAGE = 256
"""Number of image tokens up to which one block is faster than PyTorch's dense attention for ``full``."""
CHUNK = 2**22
"""Approximate number of attention weights computed at a time on a CPU, so that they stay in its cache."""


def attend(kind: AttentionKind, qkv: Tensor, text_length: int, grid: int, conv_kernel: int) -> Tensor:
    """Compute the attention of one layer, ``qkv`` (B, T + S, 3, H, D) -> (B, T + S, H, D).

    T is ``text_length`` and S = ``grid``^2; ``conv_kernel`` is the side k of the window of ``conv``.
    """
    if qkv.shape[1] != text_length + grid * grid:
        raise ValueError(f"stream of {qkv.shape[1]} positions is not {text_length} text + {grid} x {grid} image")
    if is_dense(kind, grid):
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    pattern = Pattern(text_length, windows_of(kind, grid, conv_kernel), by_column=kind == "column")
    return SparseAttention.apply(qkv, pattern)  # type: ignore[no-any-return]


def is_dense(kind: AttentionKind, grid: int) -> bool:
    """Return whether ``attend`` computes ``kind`` by PyTorch's dense attention."""
    return kind == "full" and grid * grid > DENSE_IMAGE


@lru_cache(maxsize=256)
def raster_offsets(kind: AttentionKind, grid: int, conv_kernel: int) -> tuple[int, ...]:
    """Return the raster offsets of ``kind`` on a ``grid`` x ``grid`` image, ascending, each once."""
    image = grid * grid
    if kind == "row":
        offsets = set(range(grid + 1))
    elif kind == "column":
        offsets = set(range(0, image, grid))
    elif kind == "conv":
        half = conv_kernel // 2
        offsets = {dr * grid + dc for dr in range(half + 1) for dc in range(-half, half + 1)}
    else:
        offsets = set(range(image))
    return tuple(sorted(d for d in offsets if 0 <= d < image))


@lru_cache(maxsize=256)
def windows_of(kind: AttentionKind, grid: int, conv_kernel: int) -> Windows:
    """Return the blocks and windows of ``kind``, on the transposed image for ``column``."""
    if kind == "column":
        return Windows(grid, rows=1, above=0, offsets=tuple(range(grid)))
    offsets = raster_offsets(kind, grid, conv_kernel)
    above = -(-offsets[-1] // grid)
    if grid * grid <= SMALL_IMAGE or above >= grid - 1:
        return Windows(grid, rows=grid, above=0, offsets=offsets)
    # Two rows of queries share a window of many rows, which saves work.
    return Windows(grid, 2 if above > 1 and grid % 2 == 0 else 1, above, offsets)


def describe_attention(kind: AttentionKind, text_length: int, grid: int, conv_kernel: int) -> str:
    """Describe in words how a CPU and a GPU compute ``kind``."""
    if is_dense(kind, grid):
        return "dense, by scaled_dot_product_attention"
    windows = windows_of(kind, grid, conv_kernel)
    return f"blocks of {windows.queries} queries x ({text_length} text + {windows.keys} image); flex_attention on a GPU"


@dataclass(frozen=True)
class Windows:
    """Blocks of rows of a ``grid`` x ``grid`` image, each with its window of keys."""

    grid: int
    rows: int
    """Rows of a block, a divisor of ``grid``."""
    above: int
    """Rows of a window above its block, at most ``grid - rows``."""
    offsets: tuple[int, ...]
    """Allowed values of a query's raster index minus the key's."""

    @property
    def blocks(self) -> int:
        return self.grid // self.rows

    @property
    def queries(self) -> int:
        """Number of queries in a block."""
        return self.rows * self.grid

    @property
    def keys(self) -> int:
        """Number of keys in a window."""
        return (self.above + self.rows) * self.grid

    def cut(self, image: Tensor) -> Tensor:
        """Copy keys or values (N, S, D) of N images to their windows (N * blocks, keys, D), 0 above the image."""
        if self.above == 0:
            return image.reshape(-1, self.keys, image.shape[-1])
        n, _, width = image.shape
        rows = image.unflatten(1, (self.grid, self.grid))
        windows = image.new_empty(n, self.blocks, self.above + self.rows, self.grid, width)
        windows[:, :, self.above :] = rows.unflatten(1, (self.blocks, self.rows))
        for i, blocks, image_rows in self._rows_above():
            windows[:, : blocks.start, i] = 0
            windows[:, blocks, i] = rows[:, image_rows]
        return windows.view(n * self.blocks, self.keys, width)

    def join(self, windows: Tensor) -> Tensor:
        """Sum the windows' values of each position, (N * blocks, keys, D) -> (N, S, D): the adjoint of ``cut``."""
        if self.above == 0:
            return windows.view(-1, self.grid**2, windows.shape[-1])
        parts = windows.view(-1, self.blocks, self.above + self.rows, self.grid, windows.shape[-1])
        rows = parts[:, :, self.above :].flatten(1, 2).contiguous()
        for i, blocks, image_rows in self._rows_above():
            rows[:, image_rows] += parts[:, blocks, i]
        return rows.flatten(1, 2)

    def _rows_above(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield each row of a window above its block, the blocks that have an image row there, and these image rows."""
        for i in range(self.above):
            back = self.above - i
            first = -(-back // self.rows)
            yield i, slice(first, None), slice(first * self.rows - back, self.grid - back, self.rows)


class SparseAttention(torch.autograd.Function):
    """Attention softmax(q k^T / sqrt(D) + mask) v, forward and backward a few streams at a time.

    The backward pass is written by hand, because autograd's gradients of slices and overlapping windows are large
    tensors of mostly zeros.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, pattern: Pattern) -> Tensor:
        out = torch.empty_like(qkv[:, :, 0])
        saved: list[Tensor] = []
        for part in _chunks(qkv, pattern):
            q, k, v = pattern.load(qkv[part].movedim(2, 0))
            weights = pattern.softmax_(pattern.scores(q.mul_(_scale(q)), k))
            pattern.store(pattern.mix(weights, v), out[part])
            if ctx.needs_input_grad[0]:
                saved += (q, k, v, *weights)
        ctx.pattern = pattern
        ctx.save_for_backward(out, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        pattern: Pattern = ctx.pattern
        out, *saved = ctx.saved_tensors
        d_qkv = out.new_empty(*out.shape[:2], 3, *out.shape[2:])
        inner = torch.linalg.vecdot(d_out, out)[..., None]
        for i, part in enumerate(_chunks(d_qkv, pattern)):
            q, k, v, *weights = saved[5 * i : 5 * i + 5]
            d_q, d_k, d_v = d_qkv[part].unbind(2)
            d_mixed, inner_part = pattern.load(d_out[part]), pattern.load(inner[part])
            pattern.store(pattern.spread(Weights(*weights), d_mixed), d_v)
            d_scores = pattern.softmax_backward_(Weights(*weights), pattern.scores(d_mixed, v), inner_part)
            pattern.store(pattern.mix(d_scores, k).mul_(_scale(q)), d_q)
            pattern.store(pattern.spread(d_scores, q), d_k)
        return d_qkv, None


def _chunks(qkv: Tensor, pattern: Pattern) -> Iterator[tuple[Any, ...]]:
    """Yield indices into (B, ..., H, D) that together cover all streams, a chunk at a time."""
    batch, length, _, heads, _ = qkv.shape
    samples, heads_each = batch, heads
    if qkv.device.type == "cpu":
        weights = length * pattern.text_length + pattern.windows.grid**2 * pattern.windows.keys
        samples, heads_each = chunk_on_cpu(batch, heads, weights)
    for b in range(0, batch, samples):
        for h in range(0, heads, heads_each):
            yield slice(b, b + samples), ..., slice(h, h + heads_each), slice(None)


def chunk_on_cpu(batch: int, heads: int, weights: int) -> tuple[int, int]:
    """Return how many samples, and heads of each, a CPU computes at a time; a head of one has ``weights`` weights."""
    count = max(1, min(batch * heads, CHUNK // weights))
    return max(1, count // heads), min(count, heads)


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


@dataclass(frozen=True)
class Pattern:
    """One kind of sparse attention, as products of q, k and v (n, T + S, D) of n streams.

    The methods expect images in raster order or, if ``by_column``, in the raster order of the transposed image;
    ``load`` and ``store`` convert.
    """

    text_length: int
    windows: Windows
    by_column: bool

    def load(self, x: Tensor) -> Tensor:
        """Copy (..., B, T + S, H, D) to contiguous streams (..., B * H, T + S, D)."""
        streams = x.new_empty(x.transpose(-3, -2).shape)
        targets = self._text_and_image(streams.transpose(-3, -2), False)
        for target, source in zip(targets, self._text_and_image(x, self.by_column), strict=True):
            target.copy_(source)
        return streams.flatten(-4, -3)

    def store(self, streams: Tensor, x: Tensor) -> None:
        """Copy ``streams`` (B * H, T + S, D) to ``x`` (B, T + S, H, D)."""
        streams = streams.unflatten(0, (x.shape[0], x.shape[2]))
        sources = self._text_and_image(streams.transpose(1, 2), False)
        for target, source in zip(self._text_and_image(x, self.by_column), sources, strict=True):
            target.copy_(source)

    def _text_and_image(self, x: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
        """Return views of x (..., T + S, H, D): text (..., H, T, D) and image (..., H, grid, grid, D)."""
        text, image = x.transpose(-3, -2).tensor_split([self.text_length], -2)
        image = image.unflatten(-2, (self.windows.grid, self.windows.grid))
        return text, image.transpose(-3, -2) if by_column else image

    def scores(self, q: Tensor, k: Tensor) -> Weights:
        """Return the scores q k^T."""
        to_text = torch.bmm(q, k[:, : self.text_length].mT)
        to_window = torch.bmm(self._blocks(q), self.windows.cut(k[:, self.text_length :]).mT)
        return Weights(to_text, to_window)

    def softmax_(self, scores: Weights) -> Weights:
        """Turn scores into weights, in place; the sums run in 32 bit."""
        text, image = scores.text.tensor_split([self.text_length], 1)
        text.copy_((text + causal_bias(self.text_length, text.dtype, text.device)).softmax(-1))
        window = scores.window.view(len(image), -1, self.windows.keys)
        window.unflatten(1, (self.windows.blocks, -1)).add_(window_bias(self.windows, image.dtype, image.device))
        joint = torch.cat([image, window], dim=-1)
        torch.softmax(joint, dim=-1, out=joint)
        image.copy_(joint[..., : self.text_length])
        window.copy_(joint[..., self.text_length :])
        return scores

    def softmax_backward_(self, weights: Weights, d_weights: Weights, inner: Tensor) -> Weights:
        """Turn the gradient of the weights into that of the scores, w (dw - sum w dw), in place.

        ``inner`` (n, T + S, 1) has the sums, which equal the dot products of the attention's result and its gradient.
        """
        d_weights.text.sub_(inner).mul_(weights.text)
        d_weights.window.sub_(self._blocks(inner)).mul_(weights.window)
        return d_weights

    def mix(self, weights: Weights, v: Tensor) -> Tensor:
        """Return the sum of values v (n, T + S, D) by weight, for each query."""
        mixed = torch.bmm(weights.text, v[:, : self.text_length])
        image = torch.bmm(weights.window, self.windows.cut(v[:, self.text_length :]))
        mixed[:, self.text_length :] += image.view(len(v), -1, v.shape[-1])
        return mixed

    def spread(self, weights: Weights, q: Tensor) -> Tensor:
        """Return the sum of q (n, T + S, D) by weight, for each key: the adjoint of ``mix``."""
        text = torch.bmm(weights.text.mT, q)
        image = self.windows.join(torch.bmm(weights.window.mT, self._blocks(q)))
        return torch.cat([text, image], dim=1)

    def _blocks(self, q: Tensor) -> Tensor:
        return q[:, self.text_length :].reshape(-1, self.windows.queries, q.shape[-1])


class Weights(NamedTuple):
    """Attention scores, weights or their gradients for n streams."""

    text: Tensor
    """(n, T + S, T): all queries x text."""
    window: Tensor
    """(n * blocks, queries, keys): blocks x windows."""


@lru_cache(maxsize=64)
def window_bias(windows: Windows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the mask of blocks x windows, (blocks, queries, keys): 0 for allowed keys, -inf for all others."""
    with torch.inference_mode(False):  # the cached tensor must serve training too
        query = torch.arange(windows.queries)[:, None] + windows.above * windows.grid
        key = torch.arange(windows.keys)
        allowed = torch.isin(query - key, torch.tensor(windows.offsets))
        row = key // windows.grid - windows.above + torch.arange(windows.blocks)[:, None] * windows.rows
        bias = torch.zeros(windows.blocks, windows.queries, windows.keys, dtype=dtype)
        return bias.masked_fill_(~(allowed & (row >= 0)[:, None]), -math.inf).to(device)


@lru_cache(maxsize=64)
def causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the causal mask (length, length): 0 up to the diagonal, -inf after it."""
    with torch.inference_mode(False):  # the cached tensor must serve training too
        return torch.full((length, length), -math.inf, dtype=dtype, device=device).triu_(1)
