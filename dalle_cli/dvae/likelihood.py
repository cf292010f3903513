"""The logit-Laplace likelihood of pixels (Ramesh et al. 2021, arXiv 2102.12092, appendix A.3).

A Laplace distribution over the logit of a pixel, so that the density lives on (0, 1) as pixels do. Pixels are
first moved away from the borders, where the logit is infinite, by phi.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def phi(pixels: Tensor, eps: float) -> Tensor:
    """Pixels 0..255 (uint8 or floating) -> (1 - 2 eps) pixels / 255 + eps, float32, any shape."""
    return pixels.float() * ((1 - 2 * eps) / 255) + eps


def phi_inverse(x: Tensor, eps: float) -> Tensor:
    """The inverse of ``phi``: (eps, 1 - eps) -> 0..255, floating; values beyond the range stay beyond it."""
    return (x - eps) * (255 / (1 - 2 * eps))


def logit_laplace_log_prob(x: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """Log density, in nats, of ``x`` in (0, 1) where logit(x) is Laplace(mu, b); elementwise.

    f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)). The Jacobian -ln x - ln(1 - x) is written with
    l = logit(x) as softplus(l) + softplus(-l), and b only as ``ln_b``, so that no intermediate underflows.
    ``ln_b`` is taken as it is; see ``bounded_ln_b`` for what the objective does with the decoder's output.
    """
    logit = torch.logit(x)
    jacobian = F.softplus(logit) + F.softplus(-logit)
    return jacobian - math.log(2) - ln_b - (logit - mu).abs() * torch.exp(-ln_b)


def bounded_ln_b(raw: Tensor, floor: float) -> Tensor:
    """``raw`` with a smooth lower bound: floor + softplus(raw - floor), close to ``raw`` well above it.

    Pixels are integers, so that a density on them has no largest value: on flat, noiseless pictures b would
    shrink without end and the gradients with respect to mu, which are 1 / b, grow without end.
    """
    return floor + F.softplus(raw - floor)


def reconstruct(mu: Tensor, eps: float) -> Tensor:
    """The likelihood's median as pixels: phi_inverse(sigmoid(mu)), clamped to 0..255, floating."""
    return phi_inverse(torch.sigmoid(mu), eps).clamp(0, 255)
