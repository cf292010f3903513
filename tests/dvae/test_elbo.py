"""The ELBO and REINFORCE's gradient of it against enumeration: a tiny dVAE whose codes can all be written down."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle_cli.config.schema import DvaeModel
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import (
    LossSettings,
    dvae_loss,
    encoder_input,
    kl_to_uniform,
    log_likelihood,
    validation_metrics,
)
from dalle_cli.randomness import numpy_generator, torch_generator

EPS, FLOOR, BETA = 0.1, -2.0, 1.7
POSITIONS = 2
SHAPE = (1, 3, 8, 8 * POSITIONS)
PIXELS = torch.randint(0, 256, SHAPE, generator=torch_generator(0, "pixels"), dtype=torch.uint8).permute(0, 2, 3, 1)
PER_VALUE = POSITIONS / PIXELS.numel()


def tiny(codes: int) -> DVAE:
    """Codes that differ in probability and in what they are decoded to, so that no term of the gradient is small."""
    model = DVAE(DvaeModel(n_hid=4, n_init=3, blocks_per_group=1, codebook_size=codes), seed=1)
    with torch.no_grad():
        for path, gain in (("encoder.blocks.output", 0.3), ("decoder.blocks.input", 1), ("decoder.blocks.output", 1)):
            for parameter in model.get_submodule(path).parameters():
                parameter.add_(gain * torch.randn(parameter.shape, generator=torch_generator(0, path)))
    return model


def all_codes(codes: int) -> list[Tensor]:
    """Every way to fill the picture's positions: tensors (1, 1, POSITIONS) int64."""
    return [torch.tensor(z).view(1, 1, POSITIONS) for z in itertools.product(range(codes), repeat=POSITIONS)]


def log_q(model: DVAE, tokens: Tensor) -> Tensor:
    """Ln q(z|x) of the codes (1, 1, POSITIONS), by the definition: a sum over positions."""
    log_probabilities = model.encoder(encoder_input(PIXELS, EPS)).log_softmax(dim=1)
    return sum((log_probabilities[0, int(code), 0, at] for at, code in enumerate(tokens.flatten())), torch.zeros(()))


def likelihood(model: DVAE, tokens: Tensor) -> Tensor:
    """Ln p(x|z) per value."""
    return log_likelihood(encoder_input(PIXELS, EPS), *model.decode_tokens(tokens), FLOOR)[0]


def exact_elbo(model: DVAE, codes: int, beta: float) -> Tensor:
    """E_q[ln p(x|z)] - beta KL per value, the expectation as a sum over all codes."""
    expected = sum((log_q(model, z).exp() * likelihood(model, z) for z in all_codes(codes)), torch.zeros(()))
    kl = kl_to_uniform(model.encoder(encoder_input(PIXELS, EPS))).mean() * PER_VALUE
    return expected - beta * kl


def gradient_of(model: DVAE, loss: Tensor) -> Tensor:
    """The gradient in all parameters of encoder and decoder, end to end."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    parameters = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parameters]).double()


def reinforce(model: DVAE, samples: int, generator: torch.Generator) -> Tensor:
    settings = LossSettings(
        kl_weight=BETA,
        marginal_kl_weight=0.0,
        temperature=1.0,
        eps=EPS,
        ln_b_floor=FLOOR,
        estimator="reinforce",
        reinforce_samples=samples,
    )
    return dvae_loss(model, PIXELS, settings, generator).loss


def every_draw(model: DVAE, codes: int, samples: int) -> Iterator[tuple[float, Tensor]]:
    """Each thing that drawing ``samples`` codes of the picture can give, with its probability: (S, 1, 1, P)."""
    with torch.no_grad():
        probability = [float(log_q(model, z).double().exp()) for z in all_codes(codes)]
    assert sum(probability) == pytest.approx(1, abs=1e-5)
    assert max(probability) < 0.9
    for draw in itertools.product(range(len(probability)), repeat=samples):
        weight = 1.0
        for which in draw:
            weight *= probability[which]
        yield weight, torch.stack([all_codes(codes)[which] for which in draw])


@pytest.mark.parametrize(("codes", "samples"), [(3, 2), (2, 3)])
def test_the_expectation_of_reinforces_gradient_is_the_exact_gradient(codes: int, samples: int) -> None:
    """No sampling: the estimate for every draw, weighted by the draw's probability."""
    model = tiny(codes)
    exact = gradient_of(model, -exact_elbo(model, codes, BETA))
    expected, spread = torch.zeros_like(exact), 0.0
    for weight, drawn in every_draw(model, codes, samples):
        with mock.patch("dalle_cli.dvae.objective.sample_tokens", return_value=drawn):
            estimate = gradient_of(model, reinforce(model, samples, torch.Generator()))
        expected += weight * estimate
        spread += weight * float((estimate - exact).square().sum())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    for part in (slice(0, encoder), slice(encoder, None)):  # the score function's part, and the pathwise one
        assert float(exact[part].norm()) > 1e-3
        assert float((expected[part] - exact[part]).norm()) < 1e-4 * float(exact[part].norm())
    assert spread**0.5 > 0.1 * float(exact.norm())  # single estimates are far from it: agreement is no accident


def test_sampled_estimates_centre_on_the_exact_gradient() -> None:
    """The same with codes as training draws them: along the exact gradient, the mean is its length."""
    model, generator = tiny(3), torch_generator(0, "draws")
    exact = gradient_of(model, -exact_elbo(model, 3, BETA))
    along = torch.stack([gradient_of(model, reinforce(model, 2, generator)) @ exact / exact.norm() for _ in range(400)])
    error = float(along.std()) / 20
    assert abs(float(along.mean() - exact.norm())) < 4 * error
    assert error < 0.2 * float(exact.norm())


def test_the_validation_elbo_centres_on_the_exact_one() -> None:
    model, n = tiny(3), 2000
    noise = [torch_generator(0, "validation", i) for i in range(n)]
    found = validation_metrics(model, PIXELS.expand(n, -1, -1, -1), EPS, FLOOR, noise).elbo.double()
    with torch.no_grad():
        exact = float(exact_elbo(model, 3, 1.0))
    error = float(found.std()) / n**0.5
    assert abs(float(found.mean()) - exact) < 4 * error
    values = {round(float(value), 5) for value in found}
    assert 1 < len(values) <= 9  # one for each way to fill two positions with three codes


def test_the_kl_is_in_the_loss_with_its_weight_and_scale() -> None:
    model = DVAE(DvaeModel(n_hid=8, n_init=4, codebook_size=16), seed=0)
    with torch.no_grad():  # at the initial weights the codes are nearly uniform
        for name, parameter in model.named_parameters():
            if "encoder" in name:
                parameter.mul_(1.3)
    pictures = torch.from_numpy(numpy_generator(1, "pictures").integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))

    def loss(beta: Any) -> Any:
        settings = LossSettings(
            kl_weight=beta, marginal_kl_weight=0.0, temperature=0.7, eps=0.1, ln_b_floor=-4.0, estimator="gumbel",
            reinforce_samples=2,
        )  # fmt: skip
        return dvae_loss(model, pictures, settings, torch_generator(0, "noise"))

    with torch.no_grad():
        q = model.encoder(encoder_input(pictures, 0.1)).softmax(dim=1).double()
    # KL(q || uniform) by its definition: summed over codes and positions, averaged over pictures.
    by_hand = (q * (q / (1 / 16)).log()).sum(dim=(1, 2, 3)).mean()
    found = loss(0.0)
    assert float(by_hand) > 1e-3
    assert float(found.kl) == pytest.approx(float(by_hand) / (3 * 32 * 32), rel=1e-4)
    assert float(found.kl_per_position) == pytest.approx(float(by_hand) / 16, rel=1e-4)
    assert float(found.loss.detach()) == pytest.approx(float(found.recon_nll))
    beta = torch.tensor(6.6, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(beta).loss, beta)
    assert float(slope) == pytest.approx(float(found.kl), rel=1e-6)
    for beta in (1.0, 6.6, 50.0):
        assert float((loss(beta).loss - found.loss).detach()) == pytest.approx(beta * float(found.kl), rel=1e-3)
    gradient = torch.autograd.grad(loss(1e4).loss, model.encoder.parameters())
    plain = torch.autograd.grad(found.loss, model.encoder.parameters())
    assert max(float((a - b).abs().max()) for a, b in zip(gradient, plain, strict=True)) > 1e-4
