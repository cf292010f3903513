"""The four attentions of the sparse transformer, whole streams at a time (paper, 2.2 and appendix B.1).

A stream is T text positions, then S = grid x grid image positions in raster order. Text attends to text,
causally. An image position attends to all of the text, and to image positions of its kind, described by the
set of allowed raster offsets d = (its own index) - (the other's index):

* ``row``: 0 .. grid, so itself and the tokens up to the one straight above;
* ``column``: 0, grid, 2 grid, ..., so itself and the tokens above it;
* ``conv``: a causal k x k window, wrapping around rows as ``row`` does;
* ``full``: everything before it.

Offsets make the sparse kinds block-sparse: the image is cut into blocks of consecutive tokens, and a block of
queries meets a window of keys that ends with its own block. One softmax runs over [text | window].
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.recipes.layout import AttentionKind

SMALL_IMAGE = 64
"""Up to this many image tokens one block is as fast as many: small products are bound by their number."""


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


def attend(
    kind: AttentionKind, q: Tensor, k: Tensor, v: Tensor, text_length: int, grid: int, conv_kernel: int
) -> Tensor:
    """Attention of one layer: q, k, v and the result are (B, H, T + S, D), T = ``text_length``, S = grid^2.

    The result is a transposed view of contiguous (B, T + S, H, D) for the sparse kinds: joining heads costs
    no copy.
    """
    if q.shape[2] != text_length + grid * grid:
        raise ValueError(f"stream of {q.shape[2]} positions is not {text_length} text + {grid} x {grid} image")
    if kind == "full":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    sizes = [text_length, grid * grid]
    (text_q, image_q), (text_k, image_k), (text_v, image_v) = (torch.split(x, sizes, dim=2) for x in (q, k, v))
    text = F.scaled_dot_product_attention(text_q, text_k, text_v, is_causal=True)
    if kind == "column":
        image_q, image_k, image_v = (_transposed(x, grid) for x in (image_q, image_k, image_v))
        # On the transposed image a column is a block of consecutive tokens, with causal attention within it.
        offsets, block, lags = tuple(range(grid)), grid, 0
    else:
        offsets = raster_offsets(kind, grid, conv_kernel)
        block = block_size(grid, offsets)
        lags = window_lags(grid, block, offsets)
    image = blockwise(image_q, image_k, image_v, text_k, text_v, offsets, block, lags)
    if kind == "column":
        image = _transposed(image, grid)
    return torch.cat([text.transpose(1, 2), image.transpose(1, 2)], dim=1).transpose(1, 2)


def block_size(grid: int, offsets: tuple[int, ...]) -> int:
    """Tokens of a block: a row, or the whole image where it is small or the window covers it anyway."""
    image = grid * grid
    return image if image <= SMALL_IMAGE or offsets[-1] > image - 2 * grid else grid


def window_lags(grid: int, block: int, offsets: tuple[int, ...]) -> int:
    """Blocks before its own that a query's window takes in."""
    return min(-(-offsets[-1] // block), grid * grid // block - 1)


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    offsets: tuple[int, ...],
    block: int,
    lags: int,
) -> Tensor:
    """Attention of image queries to [all text | the allowed offsets within the last ``lags + 1`` blocks].

    q, k, v: (B, H, S, D) with S a multiple of ``block``; text_k, text_v: (B, H, T, D). Returns (B, H, S, D).
    """
    batch, heads, image, width = q.shape
    text, streams, blocks, window = text_k.shape[2], batch * heads, image // block, (lags + 1) * block
    scale = 1 / math.sqrt(width)
    q, k, v = (x.contiguous().view(streams * blocks, block, width) for x in (q, k, v))
    text_k, text_v = (x.contiguous().view(streams, text, width) for x in (text_k, text_v))

    to_text = _scaled_product(q.view(streams, image, width), text_k, scale).view(streams, blocks, block, text)
    to_window = _scaled_product(q, _windows(k, lags), scale).view(streams, blocks, block, window)
    to_window = to_window + _window_bias(offsets, block, lags, blocks, q.dtype, q.device)

    text_weights, window_weights = _joint_softmax(to_text, to_window)
    mixed = torch.bmm(text_weights.flatten(1, 2), text_v).view(streams * blocks, block, width)
    mixed = torch.baddbmm(mixed, window_weights.flatten(0, 1), _windows(v, lags))
    return mixed.view(batch, heads, image, width)


def _joint_softmax(to_text: Tensor, to_local: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over [text | local] scores (..., T) and (..., L), summed in 32 bit for 16-bit scores."""
    weights = torch.cat([to_text, to_local], dim=-1).softmax(dim=-1)
    text, local = torch.split(weights, [to_text.shape[-1], to_local.shape[-1]], dim=-1)
    return text, local


def _scaled_product(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T of (N, Q, D) and (N, K, D), the scale within the matrix product."""
    ignored = q.new_zeros(()).expand(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(ignored, q, k.transpose(1, 2), beta=0, alpha=scale)


def _windows(blocks: Tensor, lags: int) -> Tensor:
    """(N, block, D), the blocks of all streams end to end -> (N, (lags + 1) * block, D) overlapping views.

    A window that starts before its stream reaches into the stream before, or into the zeros before the first
    one; the bias gives those places no weight. So windows need one padded copy and no gathering.
    """
    if lags == 0:
        return blocks
    count, block, width = blocks.shape
    padded = F.pad(blocks.reshape(count * block, width), (0, 0, lags * block, 0))
    return padded.unfold(0, (lags + 1) * block, block).transpose(1, 2)


@lru_cache(maxsize=64)
def _window_bias(
    offsets: tuple[int, ...], block: int, lags: int, blocks: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(blocks, block, window): 0 where a query may look, -inf elsewhere and before the first block."""
    with torch.inference_mode(False):  # the cached tensor must serve training too
        query = torch.arange(block)[:, None] + lags * block
        key = torch.arange((lags + 1) * block)[None, :]
        allowed = torch.isin(query - key, torch.tensor(offsets))
        within = key // block - lags + torch.arange(blocks)[:, None] >= 0
        bias = torch.zeros(blocks, block, (lags + 1) * block, dtype=dtype)
        return bias.masked_fill_(~(allowed[None] & within[:, None, :]), -math.inf).to(device)


def _transposed(image: Tensor, grid: int) -> Tensor:
    """Raster order to column order and back: (B, H, S, D) of an image's transpose."""
    return torch.unflatten(image, 2, (grid, grid)).transpose(2, 3).flatten(2, 3)
