"""Linear layers laid out for decoding, where a product has few rows and is bound by reading the weights.

On the CPU oneDNN keeps a matrix in the order in which its kernels read it. PyTorch reaches that layout through the
operators that ``torch.compile`` freezes weights with; they have no public name, so they are tried, and where a build
lacks them or has changed them the matrix stays as it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.prior.transformer import Linear

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
