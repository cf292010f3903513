"""The logit-Laplace likelihood against numerical integration and scipy's Laplace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import expit

from dalle_cli.dvae.objective import bounded_ln_b, logit_laplace_log_prob, phi, phi_inverse, reconstruct

CASES = [(0.0, 1.0), (0.0, 0.1), (1.7, 0.3), (-3.0, 0.05), (2.0, 0.8), (-1.0, 0.5)]


def density(x: np.ndarray, mu: float, b: float) -> np.ndarray:
    x = torch.as_tensor(x, dtype=torch.float64)
    log_prob = logit_laplace_log_prob(x, torch.tensor(mu).double(), torch.tensor(math.log(b)).double())
    return log_prob.exp().numpy()


@pytest.mark.parametrize(("mu", "b"), CASES)
def test_density_integrates_to_one_over_logit(mu: float, b: float) -> None:
    half = min(35.0 * b, 30.0)  # beyond |logit| of about 36, x rounds to 1
    logits = np.linspace(mu - half, mu + half, 200_001)  # the kink, mu, is a grid point
    x = expit(logits)
    assert integrate.trapezoid(density(x, mu, b) * x * (1 - x), logits) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("mu", "b"), CASES)
def test_density_integrates_to_one_over_x_and_half_lies_below_the_reconstruction(mu: float, b: float) -> None:
    median = expit(mu)
    # b <= 1, so that the density is bounded at both ends and its kink at the median is a grid point.
    below = np.linspace(1e-12, median, 400_001)
    above = np.linspace(median, 1 - 1e-12, 400_001)
    mass_below = integrate.trapezoid(density(below, mu, b), below)
    mass_above = integrate.trapezoid(density(above, mu, b), above)
    assert mass_below == pytest.approx(0.5, abs=1e-4)
    assert mass_above == pytest.approx(0.5, abs=1e-4)


def test_log_prob_is_scipys_laplace_with_the_change_of_variables() -> None:
    rng = np.random.default_rng(0)
    logit, mu, ln_b = rng.normal(0, 2, 1000), rng.normal(0, 2, 1000), rng.normal(-1, 1, 1000)
    x = expit(logit)
    expected = stats.laplace.logpdf(logit, mu, np.exp(ln_b)) - np.log(x) - np.log1p(-x)
    got = logit_laplace_log_prob(*(torch.from_numpy(v) for v in (x, mu, ln_b))).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_float32_stays_finite_with_gradients_over_the_pixels_and_far_parameters() -> None:
    x = phi(torch.arange(256), 0.1).view(-1, 1, 1)
    mu = torch.tensor([-50.0, 0.0, 50.0]).view(1, -1, 1).requires_grad_()
    raw = torch.tensor([-200.0, -10.0, 0.0, 10.0, 200.0]).requires_grad_()
    log_prob = logit_laplace_log_prob(x, mu, bounded_ln_b(raw, -5.0))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert mu.grad is not None
    assert torch.isfinite(mu.grad).all()
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()


def test_bounded_ln_b_has_its_floor_and_is_the_identity_far_above() -> None:
    raw = torch.linspace(-30, 30, 601, dtype=torch.float64)
    bounded = bounded_ln_b(raw, -4.0)
    assert bounded.min() >= -4.0
    assert (bounded.diff() > 0).all()
    torch.testing.assert_close(bounded[raw > 10], raw[raw > 10], rtol=0, atol=1e-5)


@given(eps=st.floats(0.001, 0.49), pixel=st.integers(0, 255))
def test_phi_is_inverted(eps: float, pixel: int) -> None:
    x = phi(torch.tensor([pixel], dtype=torch.uint8), eps)
    assert eps - 1e-6 <= float(x) <= 1 - eps + 1e-6
    assert float(x) == pytest.approx((1 - 2 * eps) * pixel / 255 + eps, abs=1e-6)
    # float32 near eps = 1/2, where the whole range is 0.02 wide, still tells the levels apart
    assert float(phi_inverse(x, eps)) == pytest.approx(pixel, abs=0.01)


@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_reconstruct_returns_every_pixel_and_clamps(eps: float) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    mu = torch.logit(phi(pixels, eps))
    torch.testing.assert_close(reconstruct(mu, eps), pixels.float(), rtol=0, atol=1e-3)
    assert reconstruct(torch.tensor([-90.0, 90.0]), eps).tolist() == [0.0, 255.0]
