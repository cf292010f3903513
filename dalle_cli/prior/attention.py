"""The four attentions of the sparse transformer, whole streams at a time (paper, 2.2 and appendix B.1).

A stream is T text positions, then S = grid x grid image positions in raster order. Text attends to text,
causally. An image position attends to all of the text, and to image positions of its kind, described by the
set of allowed raster offsets d = (its own index) - (the other's index):

* ``row``: 0 .. grid, so itself and the tokens up to the one straight above;
* ``column``: 0, grid, 2 grid, ..., so itself and the tokens above it;
* ``conv``: a causal k x k window, wrapping around rows as ``row`` does;
* ``full``: everything before it.

The sparse kinds cost what they look at: all queries meet the text, blocks of image queries meet their windows, both
in dense products, and one softmax runs over [text | window].
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


@dataclass(frozen=True)
class Windows:
    """Blocks of ``rows`` rows of a ``grid`` x ``grid`` image, with windows that begin ``above`` rows before them.

    ``rows`` divides ``grid``; ``above`` is at most ``grid - rows``. ``offsets`` are the raster offsets, a query's
    index less a key's, at which a query may look.
    """

    grid: int
    rows: int
    above: int
    offsets: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return self.grid // self.rows

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return self.rows * self.grid

    @property
    def keys(self) -> int:
        """Keys of a window."""
        return (self.above + self.rows) * self.grid

    def cut(self, image: Tensor) -> Tensor:
        """Keys or values (N, S, D) of N images -> (N * blocks, keys, D) of the windows; rows above the image are 0."""
        if self.above == 0:
            return image.reshape(-1, self.keys, image.shape[-1])
        n, _, width = image.shape
        rows = image.unflatten(1, (self.grid, self.grid))
        windows = image.new_empty(n, self.blocks, self.above + self.rows, self.grid, width)
        windows[:, :, self.above :] = rows.unflatten(1, (self.blocks, self.rows))
        for place, blocks, seen in self._rows_above():
            windows[:, : blocks.start, place] = 0
            windows[:, blocks, place] = rows[:, seen]
        return windows.view(n * self.blocks, self.keys, width)

    def join(self, windows: Tensor) -> Tensor:
        """The adjoint of ``cut``: adds up what stands in several windows for one row."""
        if self.above == 0:
            return windows.view(-1, self.grid**2, windows.shape[-1])
        parts = windows.view(-1, self.blocks, self.above + self.rows, self.grid, windows.shape[-1])
        rows = parts[:, :, self.above :].flatten(1, 2).contiguous()
        for place, blocks, seen in self._rows_above():
            rows[:, seen] += parts[:, blocks, place]
        return rows.flatten(1, 2)

    def _rows_above(self) -> Iterator[tuple[int, slice, slice]]:
        """For each place of a window above its block: which blocks have a row of the image there, and which rows."""
        for place in range(self.above):
            back = self.above - place
            first = -(-back // self.rows)
            yield place, slice(first, None), slice(first * self.rows - back, self.grid - back, self.rows)


@lru_cache(maxsize=64)
def window_bias(windows: Windows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(blocks, queries, keys): 0 where a query may look, -inf elsewhere and above the image."""
    with torch.inference_mode(False):  # the cached tensor must serve training too
        query = torch.arange(windows.queries)[:, None] + windows.above * windows.grid
        key = torch.arange(windows.keys)
        allowed = torch.isin(query - key, torch.tensor(windows.offsets))
        row = key // windows.grid - windows.above + torch.arange(windows.blocks)[:, None] * windows.rows
        bias = torch.zeros(windows.blocks, windows.queries, windows.keys, dtype=dtype)
        return bias.masked_fill_(~(allowed & (row >= 0)[:, None]), -math.inf).to(device)


SMALL_IMAGE = 64
"""Up to this many image tokens one block is as fast as many: small products are bound by their number."""
DENSE_IMAGE = 256
"""Up to this many, one block is also faster than PyTorch's dense attention for ``full``."""
CHUNK = 2**22
"""About so many weights are worked on at a time on a CPU, so that they stay in its cache."""


@lru_cache(maxsize=256)
def raster_offsets(kind: AttentionKind, grid: int, conv_kernel: int) -> tuple[int, ...]:
    """The allowed offsets of ``kind`` on a ``grid`` x ``grid`` image, ascending, each once."""
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


def attend(kind: AttentionKind, qkv: Tensor, text_length: int, grid: int, conv_kernel: int) -> Tensor:
    """Attention of one layer: queries, keys and values (B, T + S, 3, H, D) -> (B, T + S, H, D).

    T = ``text_length``, S = grid^2.

    Raises:
        ValueError: the stream has another length.
    """
    if qkv.shape[1] != text_length + grid * grid:
        raise ValueError(f"stream of {qkv.shape[1]} positions is not {text_length} text + {grid} x {grid} image")
    if is_dense(kind, grid):
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    pattern = Pattern(text_length, windows_of(kind, grid, conv_kernel), by_column=kind == "column")
    return SparseAttention.apply(qkv, pattern)  # type: ignore[no-any-return]


def is_dense(kind: AttentionKind, grid: int) -> bool:
    """Whether ``attend`` leaves ``kind`` to PyTorch's own attention."""
    return kind == "full" and grid * grid > DENSE_IMAGE


def describe_attention(kind: AttentionKind, text_length: int, grid: int, conv_kernel: int) -> str:
    """How ``attend`` computes one kind, in words."""
    if is_dense(kind, grid):
        return "dense, by scaled_dot_product_attention"
    windows = windows_of(kind, grid, conv_kernel)
    return f"blocks of {windows.queries} queries x ({text_length} text + {windows.keys} image)"


@lru_cache(maxsize=256)
def windows_of(kind: AttentionKind, grid: int, conv_kernel: int) -> Windows:
    """The blocks of one ``kind``. Those of ``column`` are of the transposed image, where a column is a row."""
    if kind == "column":
        return Windows(grid, rows=1, above=0, offsets=tuple(range(grid)))
    offsets = raster_offsets(kind, grid, conv_kernel)
    above = -(-offsets[-1] // grid)
    if grid * grid <= SMALL_IMAGE or above >= grid - 1:
        return Windows(grid, rows=grid, above=0, offsets=offsets)
    # A window of many rows is better shared by two rows of queries.
    return Windows(grid, 2 if above > 1 and grid % 2 == 0 else 1, above, offsets)


class Weights(NamedTuple):
    """Scores, weights or their gradients, of n streams: (n, T + S, T) of the text, (n * blocks, queries, keys) of the
    windows.
    """

    text: Tensor
    window: Tensor


@dataclass(frozen=True)
class Pattern:
    """Sparse attention as products of q, k and v (n, T + S, D) of n streams, whose images are in the windows' order."""

    text_length: int
    windows: Windows
    by_column: bool

    def load(self, x: Tensor) -> Tensor:
        """(..., B, T + S, H, D) -> contiguous streams (..., B * H, T + S, D)."""
        streams = x.new_empty(x.transpose(-3, -2).shape)
        for to, of in zip(self._parts(streams.transpose(-3, -2), False), self._parts(x, self.by_column), strict=True):
            to.copy_(of)
        return streams.flatten(-4, -3)

    def store(self, streams: Tensor, x: Tensor) -> None:
        """Write ``streams`` (B * H, T + S, D) to ``x`` (B, T + S, H, D)."""
        streams = streams.unflatten(0, (x.shape[0], x.shape[2]))
        for to, of in zip(self._parts(x, self.by_column), self._parts(streams.transpose(1, 2), False), strict=True):
            to.copy_(of)

    def _parts(self, x: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
        """Views of the text (..., H, T, D) and the image (..., H, grid, grid, D) of x (..., T + S, H, D)."""
        text, image = x.transpose(-3, -2).tensor_split([self.text_length], -2)
        image = image.unflatten(-2, (self.windows.grid, self.windows.grid))
        return text, image.transpose(-3, -2) if by_column else image

    def scores(self, q: Tensor, k: Tensor) -> Weights:
        """Q k^T."""
        to_text = torch.bmm(q, k[:, : self.text_length].mT)
        to_window = torch.bmm(self._blocks(q), self.windows.cut(k[:, self.text_length :]).mT)
        return Weights(to_text, to_window)

    def softmax_(self, scores: Weights) -> Weights:
        """Turn scores into weights, in place. Sums of 16-bit numbers run in 32 bit."""
        text, image = scores.text.tensor_split([self.text_length], 1)
        text.copy_((text + _causal_bias(self.text_length, text.dtype, text.device)).softmax(-1))
        window = scores.window.view(len(image), -1, self.windows.keys)
        window.unflatten(1, (self.windows.blocks, -1)).add_(window_bias(self.windows, image.dtype, image.device))
        joint = torch.cat([image, window], dim=-1)
        torch.softmax(joint, dim=-1, out=joint)
        image.copy_(joint[..., : self.text_length])
        window.copy_(joint[..., self.text_length :])
        return scores

    def softmax_backward_(self, weights: Weights, d_weights: Weights, inner: Tensor) -> Weights:
        """The gradient of the scores, w (dw - sum w dw), in the place of ``d_weights``.

        ``inner`` (n, T + S, 1) are the sums, which are also the products of attention's result and its gradient.
        """
        d_weights.text.sub_(inner).mul_(weights.text)
        d_weights.window.sub_(self._blocks(inner)).mul_(weights.window)
        return d_weights

    def mix(self, weights: Weights, v: Tensor) -> Tensor:
        """Sums of v (n, T + S, D) by the weights of each query."""
        mixed = torch.bmm(weights.text, v[:, : self.text_length])
        image = torch.bmm(weights.window, self.windows.cut(v[:, self.text_length :]))
        mixed[:, self.text_length :] += image.view(len(v), -1, v.shape[-1])
        return mixed

    def spread(self, weights: Weights, q: Tensor) -> Tensor:
        """The adjoint of ``mix``: sums of q (n, T + S, D) by the weights of each key."""
        text = torch.bmm(weights.text.mT, q)
        image = self.windows.join(torch.bmm(weights.window.mT, self._blocks(q)))
        return torch.cat([text, image], dim=1)

    def _blocks(self, q: Tensor) -> Tensor:
        return q[:, self.text_length :].reshape(-1, self.windows.queries, q.shape[-1])


class SparseAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D) + mask) v, forward and backward a few streams at a time; see ``attend``.

    Written out, because the derived gradients of slices and overlapping windows are large tensors of mostly zeros.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, pattern: Pattern) -> Tensor:
        out = torch.empty_like(qkv[:, :, 0])
        kept: list[Tensor] = []
        for part in _chunks(qkv, pattern):
            q, k, v = pattern.load(qkv[part].movedim(2, 0))
            weights = pattern.softmax_(pattern.scores(q.mul_(_scale(q)), k))
            pattern.store(pattern.mix(weights, v), out[part])
            if ctx.needs_input_grad[0]:
                kept += (q, k, v, *weights)
        ctx.pattern = pattern
        ctx.save_for_backward(out, *kept)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        pattern: Pattern = ctx.pattern
        out, *kept = ctx.saved_tensors
        d_qkv = out.new_empty(*out.shape[:2], 3, *out.shape[2:])
        inner = torch.linalg.vecdot(d_out, out)[..., None]
        for at, part in enumerate(_chunks(d_qkv, pattern)):
            q, k, v, *weights = kept[5 * at : 5 * at + 5]
            d_q, d_k, d_v = d_qkv[part].unbind(2)
            d_mixed, of_inner = pattern.load(d_out[part]), pattern.load(inner[part])
            pattern.store(pattern.spread(Weights(*weights), d_mixed), d_v)
            d_scores = pattern.softmax_backward_(Weights(*weights), pattern.scores(d_mixed, v), of_inner)
            pattern.store(pattern.mix(d_scores, k).mul_(_scale(q)), d_q)
            pattern.store(pattern.spread(d_scores, q), d_k)
        return d_qkv, None


def _chunks(qkv: Tensor, pattern: Pattern) -> Iterator[tuple[Any, ...]]:
    """Indices of (B, ..., H, D) that together take all streams, some at a time."""
    batch, length, _, heads, _ = qkv.shape
    samples, heads_each = batch, heads
    if qkv.device.type == "cpu":
        weights = length * pattern.text_length + pattern.windows.grid**2 * pattern.windows.keys
        samples, heads_each = chunk_on_cpu(batch, heads, weights)
    for b in range(0, batch, samples):
        for h in range(0, heads, heads_each):
            yield slice(b, b + samples), ..., slice(h, h + heads_each), slice(None)


def chunk_on_cpu(batch: int, heads: int, weights: int) -> tuple[int, int]:
    """How many samples and heads of them are worked on at a time, where each stream has so many ``weights``."""
    count = max(1, min(batch * heads, CHUNK // weights))
    return max(1, count // heads), min(count, heads)


def _scale(q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1])


@lru_cache(maxsize=64)
def _causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(length, length): 0 up to the diagonal, -inf behind it."""
    with torch.inference_mode(False):  # the cached tensor must serve training too
        return torch.full((length, length), -math.inf, dtype=dtype, device=device).triu_(1)
