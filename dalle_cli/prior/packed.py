"""Linear layers laid out for decoding, where a product has few rows and is bound by reading the weights.

On the CPU oneDNN keeps a matrix in the order in which its kernels read it. PyTorch reaches that layout through the
operators that ``torch.compile`` freezes weights with; they have no public name, so where a build lacks them the
matrix stays as it is.
"""

from __future__ import annotations

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
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) of any type -> (..., out) in ``dtype``."""
        x = x.to(self.dtype)
        if self.packed:
            activation = "gelu" if self.gelu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "none")  # type: ignore[no-any-return]
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a layout of its own for this matrix."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or bool(operators._is_mkldnn_bf16_supported())
