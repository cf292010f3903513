"""The dVAE's loss and its metrics (Ramesh et al. 2021, arXiv 2102.12092, appendix A.2, A.3).

Everything in ``DvaeLoss`` is in nats per value: log-likelihood and KL of a picture are sums, over its 3 H W
values and over its (H / 8)(W / 8) positions, and both are divided by 3 H W. So the mean KL of a
position has the weight beta / 192, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dalle_cli.dvae.likelihood import bounded_ln_b, logit_laplace_log_prob, phi, reconstruct
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.relaxation import (
    Generators,
    gumbel_softmax,
    kl_to_uniform,
    marginal_kl,
    reinforce_surrogate,
    sample_tokens,
)
from dalle_cli.dvae.ssim import ssim

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
