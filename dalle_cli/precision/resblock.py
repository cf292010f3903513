"""The gradient of a resblock x + branch(x) that runs through its branch in 16 bit (paper, figure 4).

On its way back the gradient of the sum, in 32 bit, is multiplied by the block's scale and cast to the branch's type;
what leaves the branch at x is filtered, divided by the scale and added to the gradient of the identity path in 32 bit.
So the gradients of the block's own parameters come out multiplied by the scale. They stay so, since many would
underflow in 16 bit: whoever uses them divides in 32 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_residual(branch: Callable[[Tensor], Tensor], x: Tensor, scale: float) -> Tensor:
    """X + branch(x), whose backward pass runs through ``branch`` with gradients multiplied by ``scale``.

    Values of the gradient at x that are not finite count as zero, so that one block's overflow does not reach the
    blocks before it. Works inside ``torch.utils.checkpoint`` and with any parameters' hooks.

    Args:
        branch: its result is of x's shape, and may be of another type, such as float16.
        x: the stream, float32.
        scale: a positive number; the same in a checkpoint's first pass and its second.
    """
    return _Join.apply(x, branch(_Fork.apply(x, scale)), scale)  # type: ignore[no-any-return]


class _Fork(torch.autograd.Function):
    """x, as the branch sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).div_(ctx.scale), None


class _Join(torch.autograd.Function):
    """x + update, in x's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, update.dtype
        return x + update

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, (gradient * ctx.scale).to(ctx.dtype), None
