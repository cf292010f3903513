"""The prior's attention on a GPU, by PyTorch's ``flex_attention``.

One call attends to text and image together. Its compiled kernel skips blocks of keys that no query of a block attends
to, and its backward pass computes the weights once more, so that none of them are stored. Column attention runs on the
transposed image, where its keys lie together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle_cli.config.layout import AttentionKind
from dalle_cli.prior.attention import raster_offsets


class FlexAttention:
    """Attention of one kind over streams of T text and ``grid`` x ``grid`` image positions on ``device``.

    It computes what ``attention.attend`` computes. It is compiled on a GPU; elsewhere it runs PyTorch's own reference,
    which stores all weights.
    """

    def __init__(
        self, kind: AttentionKind, text_length: int, grid: int, conv_kernel: int, device: torch.device
    ) -> None:
        self.text_length, self.grid, self.by_column = text_length, grid, kind == "column"
        length = text_length + grid * grid
        sees = attends_to(kind, text_length, grid, conv_kernel, device)
        self.mask = create_block_mask(sees, None, None, length, length, device=str(device))

    def __call__(self, qkv: Tensor) -> Tensor:
        """Compute the attention, (B, T + S, 3, H, D) -> (B, T + S, H, D)."""
        q, k, v = (x.transpose(1, 2) for x in self._transposed(qkv).unbind(2))
        # Inside a compiled resblock, the call is compiled with it.
        plain = torch.compiler.is_compiling() or qkv.device.type != "cuda"
        attention = cast(Callable[..., Tensor], flex_attention) if plain else _compiled()
        out = attention(q, k, v, block_mask=self.mask)
        return self._transposed(out.transpose(1, 2))

    def _transposed(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, T + S, ...), with the image's rows and columns swapped for column attention."""
        if not self.by_column:
            return x
        text, image = x.tensor_split([self.text_length], 1)
        return torch.cat([text, image.unflatten(1, (self.grid, self.grid)).transpose(1, 2).flatten(1, 2)], 1)


def attends_to(
    kind: AttentionKind, text_length: int, grid: int, conv_kernel: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the mask of ``kind`` as ``flex_attention`` takes it: whether a query's position attends to a key's.

    For ``column``, image positions are those of the transposed image.
    """
    image, by_column = grid * grid, kind == "column"
    offsets = range(grid) if by_column else raster_offsets(kind, grid, conv_kernel)
    allowed = torch.zeros(image, dtype=torch.bool)
    allowed[list(offsets)] = True
    allowed = allowed.to(device)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        offset = query - key
        near = allowed[offset.clamp(0, image - 1)]
        if by_column:
            near = near & ((query - text_length) // grid == (key - text_length) // grid)
        return (offset >= 0) & ((key < text_length) | near)

    return sees


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
