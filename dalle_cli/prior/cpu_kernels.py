"""Matrix products for decoding on the CPU, where a product has few rows and is bound by reading the weights.

oneDNN can store a matrix in the order in which its kernels read it. PyTorch offers that layout through the private
operators with which ``torch.compile`` freezes weights. If a trial product shows that a build lacks or has changed them,
matrices keep their layout.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.prior.model import Linear

Precision = Literal["fp32", "bf16"]


class PackedLinear:
    """A copy of a ``Linear`` for inference in ``dtype`` with sums in 32 bit, and the exact GELU if ``gelu``."""

    def __init__(self, linear: Linear, dtype: torch.dtype, gelu: bool = False) -> None:
        self.dtype, self.gelu = dtype, gelu
        self.weight, self.bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
        self.packed = can_pack(self.weight)
        if self.packed:
            self.weight = _pack(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) of any type to (..., out) in ``dtype``."""
        x = x.to(self.dtype)
        if self.packed:
            return _multiply(x, self.weight, self.bias, "gelu" if self.gelu else "none")
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


def can_pack(weight: Tensor) -> bool:
    """Return whether oneDNN can pack this matrix."""
    return weight.device.type == "cpu" and packing_works(weight.dtype)


@lru_cache(maxsize=8)
@torch.inference_mode()
def packing_works(dtype: torch.dtype) -> bool:
    """Return whether a trial product with a packed matrix of ``dtype`` works and is right on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, bias, x = (
        torch.linspace(-1, 1, n).to(dtype).view(shape) for n, shape in ((24, (6, 4)), (6, 6), (8, (2, 4)))
    )
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        found = _multiply(x, _pack(weight), bias, "gelu")
    except (AttributeError, RuntimeError, TypeError):  # the operators are gone, or take other arguments
        return False
    return torch.allclose(found.float(), F.gelu(F.linear(x.float(), weight.float(), bias.float())), atol=0.05)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def _multiply(x: Tensor, packed: Tensor, bias: Tensor, activation: Literal["none", "gelu"]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")  # type: ignore[no-any-return]


MAX_ROWS = 8
"""Maximum number of rows for ``skinny_bmm``'s fast path; with more rows, reusing the matrix across them pays."""
MIN_VALUES = {torch.bfloat16: 2**14, torch.float32: 2**18}
"""Minimum number of values in all matrices for the fast path; in smaller products overhead dominates."""


def skinny_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``torch.bmm`` of a (S, n, K) and b (S, K, N), fast for small n and contiguous rows of b; forward only.

    The fast path computes weighted sums of b's rows by ``embedding_bag``, which reads each row once.
    """
    streams, n, inner = a.shape
    width = b.shape[-1]
    pitch, rest = divmod(b.stride(0), width)
    contiguous_rows = b.stride()[1:] == (width, 1) and rest == 0
    small = b.numel() < MIN_VALUES.get(b.dtype, math.inf)
    if n > MAX_ROWS or small or not contiguous_rows or not has_embedding_bag(b.device):
        return torch.bmm(a, b)
    rows = b.as_strided(((streams - 1) * pitch + inner, width), (width, 1))
    indices, offsets = _bag_indices(streams, n, inner, pitch)
    return F.embedding_bag(indices, rows, offsets, mode="sum", per_sample_weights=a.reshape(-1)).view(streams, n, width)


@lru_cache(maxsize=8)
def has_embedding_bag(device: torch.device) -> bool:
    """Return whether FBGEMM's ``embedding_bag`` is compiled for this processor."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


@lru_cache(maxsize=8)  # enough for the shapes of all kinds of attention
def _bag_indices(streams: int, n: int, inner: int, pitch: int) -> tuple[Tensor, Tensor]:
    """Return ``embedding_bag``'s indices and offsets for S matrices whose first rows are ``pitch`` rows apart.

    The indices (S n K,) give each weight its row of values; the offsets (S n,) are where each sum begins.
    """
    first = torch.arange(streams, dtype=torch.int32).repeat_interleave(n) * pitch
    indices = (first[:, None] + torch.arange(inner, dtype=torch.int32)).flatten()
    return indices, torch.arange(0, len(indices), inner, dtype=torch.int32)
