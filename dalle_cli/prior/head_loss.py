"""Cross-entropy of a vocabulary head, with loss and gradients computed slice by slice so that not all logits exist.

The logits are the largest tensors of a training step (1024 x 8192 for the image tokens of one sample), and autograd
would keep three tensors of their size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 2**24
"""Approximate number of logits that exist at a time."""


def head_loss(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of softmax(weight x + bias) against ``targets``, in nats, summed over N rows.

    Shapes are x (N, d), weight (V, d), bias (V,) and targets (N,) int64. Products run in the type of ``weight`` or of
    autocast, softmax and sums in 32 bit or more. ``backward`` can run only once.
    """
    device = x.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if not torch.is_grad_enabled():  # needs_input_grad of an autograd function ignores no_grad
        weight, bias = weight.detach(), bias.detach()
    with torch.autocast(device, enabled=False):
        return _HeadLoss.apply(x.to(kind), weight.to(kind), bias, targets)  # type: ignore[no-any-return]


class _HeadLoss(torch.autograd.Function):
    """The loss; the forward pass, which has the softmax, computes the gradients too, and backward scales them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        wanted = any(ctx.needs_input_grad)
        d_x, d_weight, d_bias = (
            (torch.empty_like(x), torch.empty_like(weight), torch.zeros_like(bias)) if wanted else (x, weight, bias)
        )
        rows = max(1, CHUNK // len(weight))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            logits = F.linear(x[part], weight).to(loss.dtype).add_(bias)
            peak, chosen = logits.amax(-1, keepdim=True), logits.gather(-1, target)
            probabilities = torch.softmax(logits, dim=-1, out=logits)
            # The largest probability is 1 / sum exp(logit - peak).
            log_sum = peak - probabilities.amax(-1, keepdim=True).log()
            loss += (log_sum - chosen).sum()
            if wanted:
                d_logits = probabilities.scatter_add_(-1, target, torch.full_like(chosen, -1)).to(x.dtype)
                torch.mm(d_logits, weight, out=d_x[part])
                d_weight.addmm_(d_logits.T, x[part], beta=int(start > 0))
                d_bias += d_logits.sum(0)
        if wanted and not len(x):
            d_weight.zero_()
        ctx.gradients = (d_x, d_weight, d_bias) if wanted else None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("backward through head_loss runs once: it scales its gradients in place")
        return *(gradient.mul_(d_loss) for gradient in gradients), None
