from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dalle_cli.errors import UserError
from dalle_cli.fid import metrics
from dalle_cli.fid.features import Extracted
from dalle_cli.fid.metrics import (
    FrechetTo,
    compare,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    resampled,
    warnings_about,
)


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(seed + 99).normal(size=(d, d)) / d**0.5
    return torch.from_numpy((rng.normal(size=(n, d)) @ mixing * scale + shift).astype(np.float32))


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 16), (50, 60, 8), (10, 12, 24)])
def test_fid_is_the_frechet_distance_by_a_matrix_square_root(n: int, m: int, d: int) -> None:
    a, b = normal(n, d, 1), normal(m, d, 2, scale=1.5, shift=0.3)
    x, y = a.double().numpy(), b.double().numpy()
    s, t = (np.cov(z, rowvar=False) for z in (x, y))
    # sqrt(S) T sqrt(S) is symmetric, so its root is real also where S T has no unique one.
    half = scipy.linalg.sqrtm(s + 1e-12 * np.eye(d)).real
    root = np.sqrt(np.clip(np.linalg.eigvalsh(half @ t @ half), 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert FrechetTo(b)(a) == pytest.approx(expected, rel=1e-4)
    if min(n, m) > d:
        plain = np.trace(scipy.linalg.sqrtm(s @ t).real)
        assert root == pytest.approx(plain, rel=1e-6)


def test_fid_of_two_gaussians_has_its_closed_form() -> None:
    base = np.random.default_rng(0).normal(size=(4000, 6))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    first, second = np.array([1, 2, 3, 1, 0.5, 2.0]), np.array([2, 2, 1, 0.1, 0.5, 1.0])
    mean = np.array([0.5, 0, -1, 0, 0, 2])
    # Diagonal covariances: the sum of (mean difference)^2 + (difference of deviations)^2.
    expected = (mean**2).sum() + ((first - second) ** 2).sum()
    a, b = torch.from_numpy(base * first), torch.from_numpy(base * second + mean)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert FrechetTo(b)(a) == pytest.approx(expected, rel=1e-9)
    assert FrechetTo(a)(a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_cubic_mmd() -> None:
    a, b = normal(40, 5, 1), normal(40, 5, 2, shift=0.5)
    x, y = a.double().numpy(), b.double().numpy()

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / 5 + 1) ** 3)

    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    across = sum(kernel(u, v) for u in x for v in y) / 40**2
    figures = kernel_distance(a, b)
    assert figures.kid_mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert figures[1:] == (None, 40, 1)


def test_kid_subsets_follow_the_counts_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(30, 5, 1), normal(80, 5, 2)
    figures = kernel_distance(a, b, seed=1)
    assert (figures.kid_subset_size, figures.kid_subsets) == (30, 100)
    assert figures.kid_std is not None
    # Smaller subsets of the same unbiased estimate scatter around its value for all pictures.
    assert abs(figures.kid_mean - kernel_distance(a, b[:30]).kid_mean) < 5 * figures.kid_std
    assert kernel_distance(a, b, seed=1) == figures != kernel_distance(a, b, seed=2)
    monkeypatch.setattr(metrics, "KID_SUBSETS", 2)
    assert kernel_distance(normal(1200, 3, 1), normal(1100, 3, 2)).kid_subset_size == 1000


def test_inception_score_of_closed_forms() -> None:
    certain = torch.eye(7).repeat(20, 1) * 1000
    mean, std, splits = inception_score(certain)
    assert mean == pytest.approx(7)
    assert (std, splits) == (None, 1)
    assert inception_score(torch.zeros(50, 7))[0] == pytest.approx(1)
    assert inception_score(certain[:1].repeat(50, 1))[0] == pytest.approx(1)
    # Half the pictures certain of class 0, half undecided: by hand.
    mixed = torch.tensor([[1000.0, 0.0]] * 10 + [[0.0, 0.0]] * 10)
    by_hand = np.exp(0.5 * np.log(1 / 0.75) + 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)))
    assert inception_score(mixed)[0] == pytest.approx(by_hand)


def test_the_inception_score_of_many_pictures_is_the_mean_over_splits() -> None:
    logits = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    mean, std, splits = inception_score(logits, seed=3)
    order = np.random.RandomState(3).permutation(3000)
    scores = [inception_score(logits[torch.from_numpy(rows)]).mean for rows in np.split(order, 3)]
    assert splits == 3
    assert mean == pytest.approx(np.mean(scores), rel=1e-9)
    assert std == pytest.approx(np.std(scores), rel=1e-6)


def test_inception_score_is_the_exponential_of_the_mean_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(60, 9)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
    assert inception_score(torch.from_numpy(logits))[0] == pytest.approx(np.exp(divergence.mean()), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(30, 45), (45, 30), (4, 60)])
def test_precision_and_recall_by_counting_neighbours(n: int, m: int) -> None:
    a, b = normal(n, 4, 1), normal(m, 4, 2, scale=1.3, shift=0.6)

    def share_within(inner: Tensor, outer: Tensor) -> float:
        x, y = inner.double().numpy(), outer.double().numpy()
        reach = [sorted(float(np.linalg.norm(u - v)) for j, v in enumerate(y) if j != i)[2] for i, u in enumerate(y)]
        return float(np.mean([any(np.linalg.norm(u - v) <= r for v, r in zip(y, reach, strict=True)) for u in x]))

    found = precision_recall(a, b)
    assert found.precision == pytest.approx(share_within(a, b), abs=1e-6)
    assert found.recall == pytest.approx(share_within(b, a), abs=1e-6)
    p = share_within(a, b)
    assert found.precision_error == pytest.approx((p * (1 - p) / n) ** 0.5, abs=1e-6)
    assert set(precision_recall(a[:3], b)) == {None}


def test_bootstrap_sets_are_whole_captions_and_their_spread_is_the_means() -> None:
    groups = np.repeat(np.arange(5), [1, 3, 2, 2, 1])
    for rows in resampled(9, groups, 20, seed=3):
        drawn = groups[rows]
        # As many captions as there are, each with all of its pictures as often as it was drawn.
        times = {g: (drawn == g).sum() / (groups == g).sum() for g in set(drawn.tolist())}
        assert all(value == int(value) for value in times.values())
        assert sum(times.values()) == 5
    # With equal spreads, FID is nearly the squared difference of means, 5 in one dimension: its deviation is known.
    reference = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    generated = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([5.0, 0.0])
    found = compare(Extracted(generated, None), Extracted(reference, None), bootstrap=200)
    assert found.fid_error == pytest.approx(2 * 5 / 400**0.5, rel=0.15)
    pairs = np.arange(400) // 2
    doubled = generated[pairs]
    clustered = compare(Extracted(doubled, None), Extracted(reference, None), bootstrap=200, groups=pairs)
    assert clustered.fid_error == pytest.approx(2 * 5 / 200**0.5, rel=0.15)


def test_too_few_pictures_are_refused_or_warned_of() -> None:
    logits = torch.zeros(3, 2)
    with pytest.raises(UserError, match="generated pictures: 1 given"):
        compare(Extracted(normal(1, 3, 1), None), Extracted(normal(9, 3, 2), None))
    with pytest.raises(UserError, match="reference pictures: 0 given"):
        compare(Extracted(normal(2, 3, 1), None), Extracted(torch.zeros(0, 3), None))
    few = compare(Extracted(normal(3, 3, 1), logits), Extracted(normal(9, 3, 2), None))
    warnings = warnings_about(few, "clip_is")
    assert any("3 generated pictures for 3 feature dimensions: the cov" in warning for warning in warnings)
    assert any("clip_is of 3 pictures is biased downwards" in warning for warning in warnings)
    assert any("precision and recall need more than 3" in warning for warning in warnings)
    assert few.precision is None
    enough = compare(Extracted(normal(9, 3, 1), None), Extracted(normal(9, 3, 2), None))
    assert warnings_about(enough, "clip_is") == []
    assert enough.score is None
