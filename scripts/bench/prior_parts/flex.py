"""Our attention patterns with PyTorch's ``flex_attention`` and block masks, to compare its speed on a GPU with ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle_cli.config.layout import AttentionKind
from dalle_cli.prior.attention import raster_offsets


def flex(kind: AttentionKind, text_length: int, grid: int, conv_kernel: int, device: str) -> Callable[[Tensor], Tensor]:
    """Return a function that computes what ``attend`` does: qkv (B, T + S, 3, H, D) -> (B, T + S, H, D).

    Column attention transposes the image and attends along rows, because only then does the mask have empty blocks. On
    a GPU the function is compiled; elsewhere it runs PyTorch's reference, which has a forward pass only.
    """
    image, by_column = grid * grid, kind == "column"
    allowed = torch.zeros(image, dtype=torch.bool, device=device)
    allowed[list(range(grid) if by_column else raster_offsets(kind, grid, conv_kernel))] = True

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offset = query - key
        near = allowed[offset.clamp(0, image - 1)]
        if by_column:
            near = near & ((query - text_length) // grid == (key - text_length) // grid)
        return (offset >= 0) & ((key < text_length) | near)

    length = text_length + image
    mask = create_block_mask(sees, None, None, length, length, device=device)
    attention = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def work(qkv: Tensor) -> Tensor:
        q, k, v = _transposed(qkv, text_length, grid).unbind(2) if by_column else qkv.unbind(2)
        out = attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
        return _transposed(out, text_length, grid) if by_column else out

    return work


def _transposed(x: Tensor, text_length: int, grid: int) -> Tensor:
    """Return ``x`` (B, T + S, ...) with the rows and columns of the image swapped."""
    text, image = x.tensor_split([text_length], 1)
    return torch.cat([text, image.unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2)], 1)
