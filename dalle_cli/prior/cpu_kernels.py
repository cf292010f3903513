"""Matrix products for decoding on the CPU, where a product has few rows and is bound by reading the weights.

oneDNN can store a matrix in the order in which its kernels read it. PyTorch offers that layout through the private
operators with which ``torch.compile`` freezes weights. If a trial product shows that a build lacks or has changed them,
matrices keep their layout.

FBGEMM's ``embedding_bag`` sums rows of a table, weighted by factors of 32 bit. The rows may be of 8 bits a value.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.precision.formats import DTYPES
from dalle_cli.prior.model import Linear

Precision = Literal["fp32", "bf16", "int8"]


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


INT8_BLOCK = 256
"""Most outputs of a block of an 8-bit matrix: as many sums as fit into the registers of AVX-512 beside what is read."""
INT8_ROWS = 16
"""Most rows for a product with the 8-bit matrix itself, which is read once for each row."""


class Int8Linear:
    """A copy of a ``Linear`` in 8 bits a weight, for products of few rows; all else is in 32 bit.

    The outputs are cut into blocks. In a block, the weights of each input are numbers from 0 to 255 with a scale and a
    least value of their own, and a product is the sum of these rows, weighted by the inputs.
    """

    def __init__(self, linear: Linear, gelu: bool = False) -> None:
        weight, self.bias, self.gelu = linear.weight.detach().float(), linear.bias.detach(), gelu
        self.outputs, self.inputs = weight.shape
        self.blocks = -(-self.outputs // INT8_BLOCK)
        width = -(-self.outputs // self.blocks)
        rows = F.pad(weight.T, (0, self.blocks * width - self.outputs)).unflatten(1, (self.blocks, width))
        self.weight = torch.ops.quantized.embedding_bag_byte_prepack(rows.transpose(0, 1).flatten(0, 1).contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) of any type to (..., out) in 32 bit."""
        rows = x.float().reshape(-1, self.inputs)
        many = len(rows) > INT8_ROWS or not has_embedding_bag(rows.device)
        blocks = rows @ self.restored() if many else self._weighted_sums(rows)
        y = blocks.transpose(0, 1).flatten(1)[:, : self.outputs] + self.bias
        return (F.gelu(y) if self.gelu else y).view(*x.shape[:-1], self.outputs)

    def restored(self) -> Tensor:
        """Return the matrix of each block in 32 bit, (blocks, in, width); the last outputs may be padding of zeros."""
        restored: Tensor = torch.ops.quantized.embedding_bag_byte_unpack(self.weight)
        return restored.view(self.blocks, self.inputs, -1)

    def _weighted_sums(self, rows: Tensor) -> Tensor:
        """Return the products (blocks, n, width) of ``rows`` (n, in) with all blocks."""
        indices, offsets = _bag_indices(self.blocks, len(rows), self.inputs, self.inputs)
        # A view that repeats a number would be read beyond its end.
        factors = rows.expand(self.blocks, -1, -1).reshape(-1).contiguous()
        sums: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.weight, indices, offsets, per_sample_weights=factors
        )
        return sums.view(self.blocks, len(rows), -1)


def packed(linear: Linear, precision: Precision, gelu: bool = False) -> PackedLinear | Int8Linear:
    """Return a copy of a ``Linear`` for inference in ``precision``."""
    return Int8Linear(linear, gelu) if precision == "int8" else PackedLinear(linear, DTYPES[precision], gelu)


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


@lru_cache(maxsize=64)  # enough for the shapes of all kinds of attention and of 8-bit matrices
def _bag_indices(streams: int, n: int, inner: int, pitch: int) -> tuple[Tensor, Tensor]:
    """Return ``embedding_bag``'s indices and offsets for S matrices whose first rows are ``pitch`` rows apart.

    The indices (S n K,) give each weight its row of values; the offsets (S n,) are where each sum begins.
    """
    first = torch.arange(streams, dtype=torch.int32).repeat_interleave(n) * pitch
    indices = (first[:, None] + torch.arange(inner, dtype=torch.int32)).flatten()
    return indices, torch.arange(0, len(indices), inner, dtype=torch.int32)
