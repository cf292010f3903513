"""The dVAE's loss and its metrics (Ramesh et al. 2021, arXiv 2102.12092, appendix A.2, A.3).

Everything in ``DvaeLoss`` is in nats per value: log-likelihood and KL of a picture are sums, over its 3 H W
values and over its (H / 8)(W / 8) positions, and both are divided by 3 H W. So the mean KL of a
position has the weight beta / 192, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.ssim import ssim

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


LEAST_MSE = 1e-10
"""A perfect reconstruction is given 100 dB, so that means stay finite."""


@dataclass(frozen=True)
class DvaeLoss:
    """Scalars, means over the batch, nats per value (3 H W a picture). Only ``loss`` carries a gradient."""

    loss: Tensor
    """recon_nll + kl_weight * kl, and the marginal's KL if it has a weight."""
    recon_nll: Tensor
    """-E_q[ln p(x|z)]."""
    kl: Tensor
    """KL(q(z|x) || uniform)."""
    kl_per_position: Tensor
    """The same KL in nats per token, between 0 and ln K."""

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound proper (beta = 1)."""
        return -(self.recon_nll + self.kl)


def log_likelihood(x: Tensor, mu: Tensor, ln_b: Tensor, ln_b_floor: float) -> Tensor:
    """Mean over a picture's values of the log-likelihood, in nats: (B, 3, H, W) each -> (B,)."""
    return logit_laplace_log_prob(x, mu, bounded_ln_b(ln_b, ln_b_floor)).mean(dim=(1, 2, 3))


def dvae_loss(
    model: DVAE,
    pixels: Tensor,
    *,
    kl_weight: float,
    marginal_kl_weight: float,
    temperature: float,
    eps: float,
    ln_b_floor: float,
    estimator: Literal["gumbel", "reinforce"],
    reinforce_samples: int,
    generator: Generators,
    batch_mean: Callable[[Tensor], Tensor] | None = None,
) -> DvaeLoss:
    """The relaxed ELBO of ``pixels``, (B, 3, H, W) uint8, with the sign of a loss.

    ``gumbel`` decodes one relaxed sample of the codes at ``temperature``. ``reinforce`` decodes
    ``reinforce_samples`` hard ones: the decoder's gradient is exact for them, the encoder's is the score
    function's with the log-likelihood as reward. The KL is exact in both, and its gradient too.

    ``marginal_kl_weight`` adds that much more of the KL between the batch's mean posterior and uniform, which keeps
    codes in use where a run is too short to win them back; 0 is the paper's ELBO. Below 0 it is a price on the mean
    posterior's entropy, the nats a position would cost a prior that knows frequencies only: it holds what the codes
    say of the picture and how freely they say it, so synonyms merge. For ``batch_mean``, see ``marginal_kl``; all
    else is a mean over pictures.
    """
    x = phi(pixels, eps)
    logits: Tensor = model.encoder(x)
    kl_per_position = kl_to_uniform(logits).mean()
    positions_per_value = logits[0, 0].numel() / x[0].numel()
    kl = kl_per_position * positions_per_value
    penalty = kl_weight * kl
    if marginal_kl_weight:
        penalty = penalty + marginal_kl_weight * marginal_kl(logits, batch_mean) * positions_per_value
    if estimator == "gumbel":
        mu, ln_b = model.decoder(gumbel_softmax(logits, temperature, generator))
        recon_nll = -log_likelihood(x, mu, ln_b, ln_b_floor).mean()
        loss = recon_nll + penalty
    else:
        tokens = sample_tokens(logits, reinforce_samples, generator)
        mu, ln_b = model.decode_tokens(tokens.flatten(0, 1))
        reward = log_likelihood(x.repeat(reinforce_samples, 1, 1, 1), mu, ln_b, ln_b_floor).view(reinforce_samples, -1)
        recon_nll = -reward.mean()
        surrogate = reinforce_surrogate(logits, tokens, reward)
        # The surrogate brings its gradient only: the loss keeps the ELBO's value.
        loss = recon_nll + penalty + (surrogate - surrogate.detach())
    return DvaeLoss(loss, recon_nll.detach(), kl.detach(), kl_per_position.detach())


@dataclass(frozen=True)
class ValidationMetrics:
    """Figures of pictures: all but the ELBO through their likeliest codes (argmax of the logits)."""

    elbo: Tensor
    """(B,) nats per value: of codes drawn once from the posterior, with the exact KL at weight 1."""
    recon_nll: Tensor
    """(B,) nats per value."""
    mse: Tensor
    """(B,) mean squared error of pixels on the scale 0..1, reconstructions not rounded."""
    ssim: Tensor
    """(B,) structural similarity of the same."""
    kl_per_position: Tensor
    """(B,) nats per token, of the soft codes."""
    counts: Tensor
    """(K,) int64, how often each code was used."""

    @property
    def psnr(self) -> Tensor:
        """(B,) peak signal-to-noise ratio, dB."""
        return -10 * self.mse.clamp_min(LEAST_MSE).log10()

    def summary(self) -> dict[str, float]:
        """Means over the pictures, and the codebook's use."""
        return {
            "elbo": float(self.elbo.mean()),
            "recon_nll": float(self.recon_nll.mean()),
            "mse": float(self.mse.mean()),
            "psnr": float(self.psnr.mean()),
            "ssim": float(self.ssim.mean()),
            "kl_per_position": float(self.kl_per_position.mean()),
            "codebook_perplexity": codebook_perplexity(self.counts),
            "dead_codes": dead_codes(self.counts),
        }


def merge_metrics(parts: Sequence[ValidationMetrics]) -> ValidationMetrics:
    """The metrics of several batches as those of one."""
    return ValidationMetrics(
        elbo=torch.cat([part.elbo for part in parts]),
        recon_nll=torch.cat([part.recon_nll for part in parts]),
        mse=torch.cat([part.mse for part in parts]),
        ssim=torch.cat([part.ssim for part in parts]),
        kl_per_position=torch.cat([part.kl_per_position for part in parts]),
        counts=torch.stack([part.counts for part in parts]).sum(dim=0),
    )


@torch.no_grad()
def validation_metrics(
    model: DVAE, pixels: Tensor, eps: float, ln_b_floor: float, generator: Generators
) -> ValidationMetrics:
    """The metrics of ``pixels``, (B, 3, H, W) uint8; ``generator`` draws the ELBO's codes."""
    x = phi(pixels, eps)
    logits: Tensor = model.encoder(x)
    kl_per_position = kl_to_uniform(logits).mean(dim=(1, 2))
    drawn = model.decode_tokens(sample_tokens(logits, 1, generator)[0])
    elbo = log_likelihood(x, *drawn, ln_b_floor) - kl_per_position * (logits[0, 0].numel() / x[0].numel())
    tokens = logits.argmax(dim=1)
    mu, ln_b = model.decode_tokens(tokens)
    rebuilt, original = reconstruct(mu, eps) / 255, pixels.float() / 255
    return ValidationMetrics(
        elbo=elbo,
        recon_nll=-log_likelihood(x, mu, ln_b, ln_b_floor),
        mse=(rebuilt - original).square().mean(dim=(1, 2, 3)),
        ssim=ssim(rebuilt, original),
        kl_per_position=kl_per_position,
        counts=torch.bincount(tokens.flatten(), minlength=logits.shape[1]),
    )


def codebook_perplexity(counts: Tensor) -> float:
    """exp(entropy) of the codes' frequencies: so many codes, used equally, are as varied. 0 of no counts."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(p).sum().exp()) if counts.sum() > 0 else 0.0


def dead_codes(counts: Tensor) -> int:
    """How many codes were never used."""
    return int((counts == 0).sum())
