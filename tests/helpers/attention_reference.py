"""A dense reference of the prior's attention, whose mask follows the definition of each kind pair by pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_cli.config.layout import AttentionKind


def may_look(kind: AttentionKind, text: int, grid: int, kernel: int, i: int, j: int) -> bool:
    """Return whether stream position i attends to stream position j."""
    if j > i:
        return False
    if j < text:
        return True
    query, key = i - text, j - text
    behind = query - key
    if kind == "row":
        return behind <= grid
    if kind == "column":
        return query % grid == key % grid
    if kind == "conv":
        # A step of at most k // 2 rows up and k // 2 columns aside, along the raster, leads to the key.
        half = kernel // 2
        steps = ((up, aside) for up in range(half + 1) for aside in range(-half, half + 1))
        return any(up * grid + aside == behind for up, aside in steps)
    return True


def reference(kind: AttentionKind, qkv: Tensor, text: int, grid: int, kernel: int) -> Tensor:
    length = text + grid * grid
    mask = torch.tensor([[may_look(kind, text, grid, kernel, i, j) for j in range(length)] for i in range(length)])
    q, k, v = qkv.transpose(1, 3).unbind(2)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2)


def random_qkv(
    text: int, grid: int, batch: int = 2, heads: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, text + grid * grid, 3, heads, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(found: Tensor, wanted: Tensor, qkv: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < tolerance
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    one, other = (torch.autograd.grad((y * weight).sum(), qkv)[0] for y in (found, wanted))
    assert (one - other).abs().max() < tolerance
