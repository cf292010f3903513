"""Gradients through discrete codes, and the codes' KL (Ramesh et al. 2021, arXiv 2102.12092, section 2.1).

Two estimators: the Gumbel-softmax relaxation (Jang et al. 2016; Maddison et al. 2016), biased and of low
variance, and the score function (REINFORCE) with a leave-one-out baseline, unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One for a batch, or one for each of its pictures: their noise then does not depend on how a batch is split."""


def gumbel_noise(like: Tensor, generator: Generators) -> Tensor:
    """Standard Gumbel noise of the shape of ``like``, float32, drawn on the generator's device."""
    if isinstance(generator, torch.Generator):
        exponential = torch.empty(like.shape, device=generator.device).exponential_(generator=generator)
    else:
        exponential = torch.empty(like.shape, device=generator[0].device)
        for picture, own in zip(exponential, generator, strict=True):
            picture.exponential_(generator=own)
    return -exponential.clamp_min(torch.finfo(torch.float32).tiny).log().to(like.device)


def gumbel_softmax(logits: Tensor, temperature: float, generator: Generators) -> Tensor:
    """A relaxed sample of the codes: softmax over dim 1 of (logits + Gumbel noise) / temperature.

    (B, K, h, w) -> the same shape, sums of 1 over K. The lower the temperature, the closer to one-hot samples
    of softmax(logits).
    """
    return torch.softmax((logits + gumbel_noise(logits, generator)) / temperature, dim=1)


def sample_tokens(logits: Tensor, samples: int, generator: Generators) -> Tensor:
    """``samples`` independent draws of softmax(logits) over dim 1: (B, K, h, w) -> (S, B, h, w) int64."""
    with torch.no_grad():
        return torch.stack([(logits + gumbel_noise(logits, generator)).argmax(dim=1) for _ in range(samples)])


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Exact KL(softmax(logits) || uniform over K) in nats of each position: (B, K, h, w) -> (B, h, w)."""
    log_q = torch.log_softmax(logits, dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def marginal_kl(logits: Tensor, batch_mean: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """KL(mean of softmax(logits) over batch and positions || uniform over K) in nats: (B, K, h, w) -> scalar.

    It is the part of the mean ``kl_to_uniform`` that says how unevenly codes are used; the rest is the information
    that codes carry of the picture (Hoffman and Johnson 2016, "ELBO surgery").

    ``batch_mean`` takes the mean over this part of a batch (K,) to the mean over the whole of it, where other
    processes hold the rest. The gradients of the parts, weighted by their shares, then sum to the whole's.
    """
    marginal = torch.softmax(logits, dim=1).mean(dim=(0, 2, 3))
    if batch_mean is not None:
        # The whole's value; a gradient through this part alone.
        marginal = marginal + (batch_mean(marginal.detach()) - marginal.detach())
    # A code whose probability underflows everywhere would have an infinite slope.
    return math.log(logits.shape[1]) + (marginal * marginal.clamp_min(1e-12).log()).sum()


def reinforce_surrogate(logits: Tensor, tokens: Tensor, reward: Tensor) -> Tensor:
    """A scalar whose gradient in ``logits`` is the score-function estimate of the gradient of -E[reward].

    Minimise it. Its value means nothing. With S samples a picture the baseline of each is the mean reward of
    the other S - 1 (leave-one-out), independent of it, so that the estimate is unbiased. ``reward`` brings no
    gradient of its own.

    Args:
        logits: (B, K, h, w); the codes of a picture are independent given its logits.
        tokens: (S, B, h, w) int64, drawn from softmax(logits) over K.
        reward: (S, B), one for the whole picture's codes; the expectation is averaged over B.

    Raises:
        ValueError: fewer than 2 samples, or shapes that disagree.
    """
    samples, batch = reward.shape
    if samples < 2:
        raise ValueError("the leave-one-out baseline takes at least 2 samples a picture")
    if tokens.shape != (samples, batch, *logits.shape[2:]) or batch != logits.shape[0]:
        shapes = f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}, reward {tuple(reward.shape)}"
        raise ValueError(f"{shapes} are not (B, K, h, w), (S, B, h, w), (S, B)")
    reward = reward.detach()
    baseline = (reward.sum(dim=0) - reward) / (samples - 1)
    log_q = torch.log_softmax(logits, dim=1).gather(1, tokens.transpose(0, 1))
    log_q_picture = log_q.sum(dim=(2, 3)).t()
    return -((reward - baseline) * log_q_picture).mean()
