"""The dVAE's training objective and its validation metrics (Ramesh et al. 2021, arXiv 2102.12092, section 2.1, A).

The order is that of computation: pixels, their likelihood, the posterior over codes with its two gradient estimators,
the loss, the metrics. ``DvaeLoss`` is in nats per value: an image's log-likelihood, a sum over its 3 H W values, and
its KL, a sum over its (H / 8)(W / 8) positions, are both divided by 3 H W. So the mean KL of a position has the weight
beta / 192, as in the paper.
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
from dalle_cli.dvae.perceptual import PerceptualDistance
from dalle_cli.dvae.ssim import ssim

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one per image, so that an image's noise does not depend on how a batch is split."""

MIN_MSE = 1e-10
"""Lower bound of the error in a PSNR: a perfect reconstruction counts as 100 dB, which keeps means finite."""


def phi(pixels: Tensor, eps: float) -> Tensor:
    """Map pixels 0..255 (uint8 or floating, any shape) to (1 - 2 eps) pixels / 255 + eps, float32."""
    return pixels.float() * ((1 - 2 * eps) / 255) + eps


def phi_inverse(x: Tensor, eps: float) -> Tensor:
    """Map (eps, 1 - eps) back to 0..255, floating, without clamping."""
    return (x - eps) * (255 / (1 - 2 * eps))


def encoder_input(images: Tensor, eps: float) -> Tensor:
    """Return the encoder's input for uint8 images (B, H, W, 3): (B, 3, H, W) float32, channels last in memory."""
    return phi(images, eps).permute(0, 3, 1, 2)


def reconstruct(mu: Tensor, eps: float) -> Tensor:
    """Return the likelihood's median as pixels: phi_inverse(sigmoid(mu)), clamped to 0..255, floating."""
    return phi_inverse(torch.sigmoid(mu), eps).clamp(0, 255)


def reconstructed_images(mu: Tensor, eps: float) -> Tensor:
    """Return ``reconstruct`` of mu (B, 3, H, W), rounded, as uint8 images (B, H, W, 3)."""
    return reconstruct(mu, eps).round().to(torch.uint8).permute(0, 2, 3, 1)


def logit_laplace_log_prob(x: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """Return the elementwise log density, in nats, of ``x`` in (0, 1) where logit(x) is Laplace(mu, b).

    f(x | mu, b) = exp(-|logit(x) - mu| / b) / (2 b x (1 - x)). So that nothing underflows, the Jacobian's logarithm
    -ln x - ln(1 - x) is computed as softplus(l) + softplus(-l), where l = logit(x), and b only as ``ln_b``.
    """
    logit = torch.logit(x)
    jacobian = F.softplus(logit) + F.softplus(-logit)
    return jacobian - math.log(2) - ln_b - (logit - mu).abs() * torch.exp(-ln_b)


def bounded_ln_b(raw: Tensor, floor: float) -> Tensor:
    """Bound ``raw`` smoothly from below: floor + softplus(raw - floor), close to ``raw`` well above the floor.

    Pixels are integers, so a density on them is unbounded: on flat, noiseless images b would shrink forever, and the
    gradients with respect to mu, which are 1 / b, would grow forever.
    """
    return floor + F.softplus(raw - floor)


def log_likelihood(x: Tensor, mu: Tensor, ln_b: Tensor, ln_b_floor: float) -> Tensor:
    """Return each image's log-likelihood in nats per value: (B, 3, H, W) each -> (B,)."""
    return logit_laplace_log_prob(x, mu, bounded_ln_b(ln_b, ln_b_floor)).mean(dim=(1, 2, 3))


def gumbel_noise(like: Tensor, generator: Generators) -> Tensor:
    """Draw standard Gumbel noise in the shape of ``like``, float32, on the generator's device."""
    # From uniform numbers and in place, because torch takes four times as long for exponential ones on a CPU.
    if isinstance(generator, torch.Generator):
        noise = torch.empty(like.shape, device=generator.device).uniform_(generator=generator)
    else:
        noise = torch.empty(like.shape, device=generator[0].device)
        for image, own in zip(noise, generator, strict=True):
            image.uniform_(generator=own)
    noise.clamp_(torch.finfo(torch.float32).tiny, 1 - 2**-24)  # neither logarithm is infinite
    return noise.log_().neg_().log_().neg_().to(like.device)


def gumbel_softmax(logits: Tensor, temperature: float, generator: Generators) -> Tensor:
    """Draw a relaxed sample of the codes: softmax over dim 1 of (logits + Gumbel noise) / temperature.

    (B, K, h, w) -> the same shape, summing to 1 over K and the closer to one-hot, the lower the temperature.
    """
    return torch.softmax((logits + gumbel_noise(logits, generator)) / temperature, dim=1)


def sample_tokens(logits: Tensor, samples: int, generator: Generators) -> Tensor:
    """Draw ``samples`` independent samples of softmax(logits) over dim 1: (B, K, h, w) -> (S, B, h, w) int64."""
    with torch.no_grad():
        return torch.stack([(logits + gumbel_noise(logits, generator)).argmax(dim=1) for _ in range(samples)])


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Return KL(softmax(logits) || uniform over K) at each position, exact, in nats: (B, K, h, w) -> (B, h, w)."""
    log_q = torch.log_softmax(logits, dim=1)
    return (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])


def marginal_kl(logits: Tensor, batch_mean: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return KL(mean of softmax(logits) over batch and positions || uniform over K), in nats: (B, K, h, w) -> scalar.

    It is the part of the mean ``kl_to_uniform`` that measures how unevenly codes are used; the rest is the information
    that codes carry about the image (Hoffman and Johnson 2016, "ELBO surgery"). ``batch_mean`` maps the mean (K,) over
    this rank's part of a batch to that over the whole batch; then the parts' gradients, weighted by their shares, add
    up to the whole batch's.
    """
    marginal = torch.softmax(logits, dim=1).mean(dim=(0, 2, 3))
    if batch_mean is not None:
        # The value is the whole batch's; the gradient flows only through this part.
        marginal = marginal + (batch_mean(marginal.detach()) - marginal.detach())
    # A code whose probability underflows everywhere would have an infinite slope.
    return math.log(logits.shape[1]) + (marginal * marginal.clamp_min(1e-12).log()).sum()


def reinforce_surrogate(logits: Tensor, tokens: Tensor, reward: Tensor) -> Tensor:
    """Return a scalar whose gradient in ``logits`` is the score-function estimate of the gradient of -E[reward].

    Minimise it; its value has no meaning. The baseline of each of an image's S samples is the mean reward of the other
    S - 1 (leave-one-out). It is independent of the sample, so the estimate is unbiased. No gradient flows through
    ``reward``.

    Args:
        logits: (B, K, h, w); the codes of an image are independent given its logits.
        tokens: (S, B, h, w) int64, drawn from softmax(logits) over K; S is at least 2.
        reward: (S, B), one for all codes of an image; the expectation is averaged over B.
    """
    samples, batch = reward.shape
    if samples < 2:
        raise ValueError("the leave-one-out baseline needs at least 2 samples an image")
    if tokens.shape != (samples, batch, *logits.shape[2:]) or batch != logits.shape[0]:
        shapes = f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}, reward {tuple(reward.shape)}"
        raise ValueError(f"{shapes} are not (B, K, h, w), (S, B, h, w), (S, B)")
    reward = reward.detach()
    baseline = (reward.sum(dim=0) - reward) / (samples - 1)
    log_q = torch.log_softmax(logits, dim=1).gather(1, tokens.transpose(0, 1))
    log_q_image = log_q.sum(dim=(2, 3)).t()
    return -((reward - baseline) * log_q_image).mean()


@dataclass(frozen=True)
class LossSettings:
    """Settings of ``dvae_loss`` at one update, with the schedules evaluated."""

    kl_weight: float
    """Beta, the weight of the KL to uniform; 1 gives the ELBO."""
    marginal_kl_weight: float
    """Extra weight of ``marginal_kl``; 0 is the paper's ELBO.

    Above 0 it keeps codes in use that a short run could not revive. Below 0 it penalises the entropy of the mean
    posterior, the cost of a position to a prior that knows only frequencies. It does not penalise the information that
    codes carry about the image, so codes with the same meaning merge."""
    temperature: float
    """Temperature of the Gumbel-softmax; unused by ``reinforce``."""
    eps: float
    """Pixels are mapped into (eps, 1 - eps)."""
    ln_b_floor: float
    """Lower bound of ln b, see ``bounded_ln_b``."""
    estimator: Literal["gumbel", "reinforce"]
    """``gumbel`` decodes one relaxed sample of the codes. ``reinforce`` decodes hard samples; the gradient is exact for
    the decoder and a score-function estimate, with the log-likelihood as reward, for the encoder."""
    reinforce_samples: int
    """Hard samples per image; unused by ``gumbel``."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance of the median picture; 0 is the paper's ELBO."""
    enlarged: bool = False
    """The perceptual distance sees the pictures at twice their size too."""


@dataclass(frozen=True)
class DvaeLoss:
    """Scalars, means over the batch, in nats per value (3 H W an image). Only ``loss`` carries a gradient."""

    loss: Tensor
    """recon_nll + kl_weight * kl + marginal_kl_weight * marginal KL + perceptual_weight * perceptual distance."""
    recon_nll: Tensor
    """-E_q[ln p(x|z)]."""
    kl: Tensor
    """KL(q(z|x) || uniform)."""
    kl_per_position: Tensor
    """The same KL in nats per token, between 0 and ln K."""
    perceptual: Tensor
    """Mean perceptual distance, without a unit; 0 if there is no such term."""

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound (beta = 1)."""
        return -(self.recon_nll + self.kl)


def dvae_loss(
    model: DVAE,
    images: Tensor,
    settings: LossSettings,
    generator: Generators,
    batch_mean: Callable[[Tensor], Tensor] | None = None,
    perceptual: PerceptualDistance | None = None,
) -> DvaeLoss:
    """Return the negative relaxed ELBO of uint8 images (B, H, W, 3); the KL and its gradient are always exact.

    Every term is a mean over images except ``marginal_kl``, which needs ``batch_mean`` if there are several ranks.
    ``perceptual`` adds its distance, with a weight, and needs the estimator ``gumbel``.
    """
    x = encoder_input(images, settings.eps)
    logits: Tensor = model.encoder(x)
    kl_per_position = kl_to_uniform(logits).mean()
    positions_per_value = logits[0, 0].numel() / x[0].numel()
    kl = kl_per_position * positions_per_value
    penalty = settings.kl_weight * kl
    distance = torch.zeros((), device=x.device)
    if settings.marginal_kl_weight:
        penalty = penalty + settings.marginal_kl_weight * marginal_kl(logits, batch_mean) * positions_per_value
    if settings.estimator == "gumbel":
        mu, ln_b = model.decoder(gumbel_softmax(logits, settings.temperature, generator))
        recon_nll = -log_likelihood(x, mu, ln_b, settings.ln_b_floor).mean()
        loss = recon_nll + penalty
        if perceptual is not None:
            rebuilt, original = phi_inverse(torch.sigmoid(mu), settings.eps) / 255, images.permute(0, 3, 1, 2) / 255
            distance = perceptual(rebuilt, original, enlarged=settings.enlarged).mean()
            loss = loss + settings.perceptual_weight * distance
    else:
        samples = settings.reinforce_samples
        tokens = sample_tokens(logits, samples, generator)
        mu, ln_b = model.decode_tokens(tokens.flatten(0, 1))
        reward = log_likelihood(x.repeat(samples, 1, 1, 1), mu, ln_b, settings.ln_b_floor).view(samples, -1)
        recon_nll = -reward.mean()
        surrogate = reinforce_surrogate(logits, tokens, reward)
        # The surrogate contributes its gradient only: the loss keeps the ELBO's value.
        loss = recon_nll + penalty + (surrogate - surrogate.detach())
    return DvaeLoss(loss, recon_nll.detach(), kl.detach(), kl_per_position.detach(), distance.detach())


@dataclass(frozen=True)
class ValidationMetrics:
    """Metrics of B images. All but the ELBO use the likeliest codes (argmax of the logits)."""

    elbo: Tensor
    """(B,) nats per value, with one sample of the posterior and the exact KL at weight 1."""
    recon_nll: Tensor
    """(B,) nats per value."""
    mse: Tensor
    """(B,) mean squared error of pixels on the scale 0..1, without rounding."""
    ssim: Tensor
    """(B,) structural similarity of the same."""
    kl_per_position: Tensor
    """(B,) nats per token, of the soft codes."""
    perceptual: Tensor
    """(B,) perceptual distance; 0 if the objective has no such term."""
    counts: Tensor
    """(K,) int64, the number of times each code was used."""

    @property
    def psnr(self) -> Tensor:
        """(B,) peak signal-to-noise ratio, dB."""
        return -10 * self.mse.clamp_min(MIN_MSE).log10()

    def summary(self) -> dict[str, float]:
        """Return the means over the images and the usage of the codebook."""
        return {
            "elbo": float(self.elbo.mean()),
            "recon_nll": float(self.recon_nll.mean()),
            "mse": float(self.mse.mean()),
            "psnr": float(self.psnr.mean()),
            "ssim": float(self.ssim.mean()),
            "kl_per_position": float(self.kl_per_position.mean()),
            "perceptual": float(self.perceptual.mean()),
            "codebook_perplexity": codebook_perplexity(self.counts),
            "dead_codes": dead_codes(self.counts),
        }


def merge_metrics(parts: Sequence[ValidationMetrics]) -> ValidationMetrics:
    """Join the metrics of several batches into those of one."""
    return ValidationMetrics(
        elbo=torch.cat([part.elbo for part in parts]),
        recon_nll=torch.cat([part.recon_nll for part in parts]),
        mse=torch.cat([part.mse for part in parts]),
        ssim=torch.cat([part.ssim for part in parts]),
        kl_per_position=torch.cat([part.kl_per_position for part in parts]),
        perceptual=torch.cat([part.perceptual for part in parts]),
        counts=torch.stack([part.counts for part in parts]).sum(dim=0),
    )


@torch.no_grad()
def validation_metrics(
    model: DVAE,
    images: Tensor,
    eps: float,
    ln_b_floor: float,
    generator: Generators,
    perceptual: PerceptualDistance | None = None,
    enlarged: bool = False,
) -> ValidationMetrics:
    """Return the metrics of uint8 images (B, H, W, 3); ``generator`` draws the ELBO's codes.

    ``enlarged`` is that of ``PerceptualDistance``.
    """
    chw = images.permute(0, 3, 1, 2).contiguous()  # which fixes the order of the sums below
    x = phi(chw, eps)
    logits: Tensor = model.encoder(x)
    kl_per_position = kl_to_uniform(logits).mean(dim=(1, 2))
    drawn = model.decode_tokens(sample_tokens(logits, 1, generator)[0])
    elbo = log_likelihood(x, *drawn, ln_b_floor) - kl_per_position * (logits[0, 0].numel() / x[0].numel())
    tokens = logits.argmax(dim=1)
    mu, ln_b = model.decode_tokens(tokens)
    rebuilt, original = reconstruct(mu, eps) / 255, chw.float() / 255
    distance = torch.zeros(len(images)) if perceptual is None else perceptual(rebuilt, original, enlarged=enlarged)
    return ValidationMetrics(
        elbo=elbo,
        recon_nll=-log_likelihood(x, mu, ln_b, ln_b_floor),
        mse=(rebuilt - original).square().mean(dim=(1, 2, 3)),
        ssim=ssim(rebuilt, original),
        kl_per_position=kl_per_position,
        perceptual=distance,
        counts=torch.bincount(tokens.flatten(), minlength=logits.shape[1]),
    )


def codebook_perplexity(counts: Tensor) -> float:
    """Return exp(entropy) of the codes' frequencies, the effective number of codes; 0 if all ``counts`` (K,) are 0."""
    p = counts.cpu().double() / counts.sum().cpu().clamp_min(1)
    return float(torch.special.entr(p).sum().exp()) if counts.sum() > 0 else 0.0


def dead_codes(counts: Tensor) -> int:
    """Return the number of codes that were never used."""
    return int((counts == 0).sum())
