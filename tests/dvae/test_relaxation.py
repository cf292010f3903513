"""Relaxed and score-function gradients against enumeration, chi-square and scipy; streams of randomness."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from dalle_cli.dvae.objective import gumbel_softmax, kl_to_uniform, marginal_kl, reinforce_surrogate, sample_tokens
from dalle_cli.randomness import numpy_generator, stream_seed, torch_generator

PROBABILITIES = [0.05, 0.4, 0.25, 0.3]


def many_logits(n: int) -> torch.Tensor:
    """(1, 4, n, 1) logits of PROBABILITIES, shifted by a constant that softmax ignores."""
    return (torch.tensor(PROBABILITIES).log() + 3.0).view(1, 4, 1, 1).expand(1, 4, n, 1)


def chi_square_p(tokens: torch.Tensor) -> float:
    counts = torch.bincount(tokens.flatten(), minlength=4).double().numpy()
    return float(stats.chisquare(counts, np.array(PROBABILITIES) * counts.sum()).pvalue)


def test_cold_gumbel_softmax_is_one_hot_and_distributed_as_softmax() -> None:
    relaxed = gumbel_softmax(many_logits(40_000), 1e-3, torch_generator(1, "cold"))
    assert (relaxed.amax(dim=1) > 0.999).float().mean() > 0.99
    assert chi_square_p(relaxed.argmax(dim=1)) > 1e-3


def test_sample_tokens_are_distributed_as_softmax() -> None:
    tokens = sample_tokens(many_logits(20_000), 2, torch_generator(1, "hard"))
    assert tokens.shape == (2, 1, 20_000, 1)
    assert not torch.equal(tokens[0], tokens[1])
    assert chi_square_p(tokens) > 1e-3


def test_gumbel_softmax_sums_to_one_flattens_with_temperature_and_repeats() -> None:
    logits = torch.randn(2, 5, 3, 4, generator=torch_generator(0, "logits"))
    mild, hot = (gumbel_softmax(logits, tau, torch_generator(0, "noise")) for tau in (1.0, 1e4))
    torch.testing.assert_close(mild.sum(dim=1), torch.ones(2, 3, 4))
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 5), atol=1e-3, rtol=0)
    assert torch.equal(mild, gumbel_softmax(logits, 1.0, torch_generator(0, "noise")))
    assert not torch.equal(mild, gumbel_softmax(logits, 1.0, torch_generator(0, "other")))


def test_kl_to_uniform_is_scipys_entropy() -> None:
    logits = 3 * torch.randn(2, 7, 3, 5, generator=torch_generator(0, "kl"))
    q = torch.softmax(logits.double(), dim=1).numpy()
    expected = stats.entropy(q, np.full_like(q, 1 / 7), axis=1)
    got = kl_to_uniform(logits)
    assert got.shape == (2, 3, 5)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_kl_to_uniform_of_the_extremes() -> None:
    certain = torch.full((1, 8, 1, 1), -1e4)
    certain[0, 3] = 1e4
    assert float(kl_to_uniform(certain)) == pytest.approx(np.log(8), rel=1e-6)
    assert float(kl_to_uniform(torch.zeros(1, 8, 1, 1))) == pytest.approx(0, abs=1e-6)


def exact_gradient(logits: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Gradient of -E[reward] by summing over all 9 pairs of codes; logits (B, 3, 1, 2), rewards (B, 3, 3)."""
    logits = logits.clone().requires_grad_()
    q = torch.softmax(logits, dim=1)
    pairs = itertools.product(range(3), repeat=2)
    expected = sum((q[:, i, 0, 0] * q[:, j, 0, 1] * rewards[:, i, j] for i, j in pairs), torch.zeros(()))
    (gradient,) = torch.autograd.grad(-expected.mean(), logits)
    return gradient


@pytest.mark.parametrize("samples", [2, 4])
def test_reinforce_gradient_is_the_exact_one_in_expectation(samples: int) -> None:
    generator = torch_generator(5, "reinforce", samples)
    logits = torch.randn(2, 3, 1, 2, generator=generator, dtype=torch.float64)
    # The offset is what a baseline is for: without one the error would be some 10 times larger.
    rewards = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64) + 10
    picture = torch.arange(2).expand(samples, 2)
    estimates = []
    for _ in range(4000):
        leaf = logits.clone().requires_grad_()
        tokens = sample_tokens(leaf, samples, generator)
        reward = rewards[picture, tokens[:, :, 0, 0], tokens[:, :, 0, 1]]
        (gradient,) = torch.autograd.grad(reinforce_surrogate(leaf, tokens, reward), leaf)
        estimates.append(gradient)
    stacked = torch.stack(estimates)
    standard_error = stacked.std(dim=0) / len(estimates) ** 0.5
    exact = exact_gradient(logits, rewards)
    assert ((stacked.mean(dim=0) - exact).abs() < 4 * standard_error).all()
    # The test can tell: the errors are well below the gradient itself.
    assert standard_error.norm() < 0.2 * exact.norm()


def test_reinforce_refuses_one_sample_and_wrong_shapes() -> None:
    logits = torch.zeros(2, 3, 1, 2)
    with pytest.raises(ValueError, match="at least 2"):
        reinforce_surrogate(logits, torch.zeros(1, 2, 1, 2, dtype=torch.long), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="tokens"):
        reinforce_surrogate(logits, torch.zeros(2, 2, 2, 2, dtype=torch.long), torch.zeros(2, 2))


def test_streams_are_apart_repeatable_and_of_63_bits() -> None:
    names: list[tuple[str | int, ...]] = [(), ("a",), ("a", "b"), ("ab",), (1,), ("1",), (1, 2), (12,)]
    seeds = [stream_seed(seed, *what) for seed in (0, 1, 2**63 - 1) for what in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(0, "a", 1) == stream_seed(0, "a", 1)
    assert torch_generator(0, "a").initial_seed() == stream_seed(0, "a")
    assert numpy_generator(3, "x", 1).integers(2**62) == numpy_generator(3, "x", 1).integers(2**62)
    assert numpy_generator(3, "x", 1).integers(2**62) != numpy_generator(3, "x", 2).integers(2**62)


@pytest.mark.parametrize("part", [1.0, True, None])
def test_a_stream_is_named_by_str_and_int_only(part: object) -> None:
    with pytest.raises(TypeError, match="str and int"):
        stream_seed(0, part)  # type: ignore[arg-type]


def test_marginal_kl_is_the_entropy_gap_of_the_mean_posterior() -> None:
    logits = torch.randn(3, 5, 2, 4, generator=torch_generator(0, "marginal")).double()
    mean = logits.softmax(dim=1).mean(dim=(0, 2, 3)).numpy()
    assert float(marginal_kl(logits)) == pytest.approx(float(stats.entropy(mean, np.full(5, 0.2))), rel=1e-6)
    # Posteriors that are certain, and use each code equally often, leave none of it.
    even = 100 * torch.eye(4).double()[:, :, None, None]
    assert float(marginal_kl(even)) == pytest.approx(0.0, abs=1e-9)
    assert float(kl_to_uniform(even).mean()) == pytest.approx(math.log(4))
    dead = torch.tensor([0.0, 0.0, -1e4]).view(1, 3, 1, 1).requires_grad_()
    marginal_kl(dead).backward()  # type: ignore[no-untyped-call]
    assert dead.grad is not None
    assert bool(dead.grad.isfinite().all())


@pytest.mark.parametrize(("weight", "codes_in_use"), [(0.0, 4), (-1.0, 2)])
def test_a_price_on_the_marginals_entropy_merges_synonyms_and_keeps_meanings(weight: float, codes_in_use: int) -> None:
    """Two contents, four codes: codes 0 and 1 are right for the first, 2 and 3 for the second."""
    wrong = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    logits = (0.1 * torch.randn(1, 4, 2, 1, generator=torch_generator(0, "synonyms"))).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        posterior = logits.softmax(dim=1)[0, :, :, 0].T
        loss = 10 * (posterior * wrong).sum() + 0.1 * kl_to_uniform(logits).mean() + weight * marginal_kl(logits)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    posterior = logits.detach().softmax(dim=1)[0, :, :, 0].T
    assert float((posterior * wrong).sum()) < 0.05
    assert int((posterior.mean(dim=0) > 0.01).sum()) == codes_in_use
