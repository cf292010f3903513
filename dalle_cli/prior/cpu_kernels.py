"""Linear layers laid out for decoding, where a product has few rows and is bound by reading the weights.

On the CPU oneDNN keeps a matrix in the order in which its kernels read it. PyTorch reaches that layout through the
operators that ``torch.compile`` freezes weights with; they have no public name, so they are tried, and where a build
lacks them or has changed them the matrix stays as it is.
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
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PackedLinear:
    """act(W x + b) of a ``Linear``, computed in ``dtype`` with sums in 32 bit; forward only.

    Args:
        gelu: apply the exact GELU to the result.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype, gelu: bool = False) -> None:
        self.dtype, self.gelu = dtype, gelu
        self.weight, self.bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
        self.packed = can_pack(self.weight)
        if self.packed:
            self.weight = _pack(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) of any type -> (..., out) in ``dtype``."""
        x = x.to(self.dtype)
        if self.packed:
            return _multiply(x, self.weight, self.bias, "gelu" if self.gelu else "none")
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for this matrix."""
    return weight.device.type == "cpu" and packs(weight.dtype)


@lru_cache(maxsize=8)
@torch.inference_mode()
def packs(dtype: torch.dtype) -> bool:
    """Whether this build and processor multiply packed matrices of ``dtype``, and rightly: tried on a small one."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, bias, x = (
        torch.linspace(-1, 1, n).to(dtype).view(shape) for n, shape in ((24, (6, 4)), (6, 6), (8, (2, 4)))
    )
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        found = _multiply(x, _pack(weight), bias, "gelu")
    except (AttributeError, RuntimeError, TypeError):  # operators that are gone, or take other arguments
        return False
    return torch.allclose(found.float(), F.gelu(F.linear(x.float(), weight.float(), bias.float())), atol=0.05)


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)  # type: ignore[no-any-return]


def _multiply(x: Tensor, packed: Tensor, bias: Tensor, activation: Literal["none", "gelu"]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")  # type: ignore[no-any-return]


FEW = 8
"""With more rows than this it pays to use a matrix for several of them at once."""
LEAST = {torch.bfloat16: 2**14, torch.float32: 2**18}
"""From so many numbers of all matrices on, bags are faster: smaller products are bound by their start, and in 32 bit
lie in the processor's cache."""


def thin_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm`` of a (S, n, K) and b (S, K, N), fast for small n where b's rows lie one behind the other; forward
    only.
    """
    streams, n, inner = a.shape
    width = b.shape[-1]
    pitch, rest = divmod(b.stride(0), width)
    in_rows = b.stride()[1:] == (width, 1) and rest == 0
    if n > FEW or b.numel() < LEAST.get(b.dtype, math.inf) or not in_rows or not has_bags(b.device):
        return torch.bmm(a, b)
    rows = b.as_strided(((streams - 1) * pitch + inner, width), (width, 1))
    places, bags = _places(streams, n, inner, pitch)
    return F.embedding_bag(places, rows, bags, mode="sum", per_sample_weights=a.reshape(-1)).view(streams, n, width)


@lru_cache(maxsize=8)
def has_bags(device: torch.device) -> bool:
    """Whether bags of embeddings are compiled for this processor: by FBGEMM."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


@lru_cache(maxsize=8)  # as many as are in use at a time: those of each kind of attention
def _places(streams: int, n: int, inner: int, pitch: int) -> tuple[Tensor, Tensor]:
    """For each number of a, which row it counts, of matrices that begin ``pitch`` rows apart; and where in them the
    numbers of each of the S n sums begin.
    """
    first = torch.arange(streams, dtype=torch.int32).repeat_interleave(n) * pitch
    places = (first[:, None] + torch.arange(inner, dtype=torch.int32)).flatten()
    return places, torch.arange(0, len(places), inner, dtype=torch.int32)
