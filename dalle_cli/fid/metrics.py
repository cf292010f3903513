"""FID, KID, Inception Score, precision and recall of generated pictures against real ones, by torch-fidelity.

FID (Heusel et al. 2017) is the Frechet distance of two Gaussians fitted to features. KID (Binkowski et al. 2018) is
the squared maximum mean discrepancy under a cubic kernel. The Inception Score (Salimans et al. 2016) is the exponential
of the mean KL divergence of the pictures' class distributions from their average. Precision is the share of generated
pictures within the manifold of the real ones; recall is the reverse. A manifold is the union of balls around its
pictures, each reaching to the third nearest neighbour (Kynkaanniemi et al. 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from dalle_cli.errors import UserError
from dalle_cli.fid.features import Extracted
from dalle_cli.fid.figures import Figures
from dalle_cli.randomness import numpy_generator

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
MAX_SPLITS = 10
PICTURES_PER_SPLIT = 1000
NEIGHBOURS = 3
"""Rank of the nearest neighbour to which a ball of precision and recall reaches."""
DISTANCES_AT_ONCE = 4096
"""Rows and columns of a block of the distance matrix."""


class KernelDistance(NamedTuple):
    """KID over random subsets; ``kid_std`` is None for a single subset."""

    kid_mean: float
    kid_std: float | None
    kid_subset_size: int
    kid_subsets: int


class PrecisionRecall(NamedTuple):
    """Precision and recall with their binomial standard errors; all None for too few pictures."""

    precision: float | None = None
    precision_error: float | None = None
    recall: float | None = None
    recall_error: float | None = None


class InceptionScore(NamedTuple):
    """Mean and standard deviation over ``splits`` of the pictures; ``std`` is None for a single split."""

    mean: float
    std: float | None
    splits: int


def compare(
    generated: Extracted,
    reference: Extracted,
    *,
    seed: int = 0,
    bootstrap: int = 0,
    groups: NDArray[np.int64] | None = None,
    frechet: FrechetTo | None = None,
) -> Figures:
    """Return the metrics of the ``generated`` pictures' features against those of the ``reference``.

    The score by class needs class logits. ``seed`` decides KID's subsets, the score's splits and the bootstrap sets.

    Args:
        generated: Features of the generated pictures.
        reference: Features of the real pictures.
        seed: Random seed.
        bootstrap: Number of bootstrap sets of the generated pictures for the standard errors of FID and score, 0 for
            none. The reference is fixed, as in published figures.
        groups: Index of each generated picture's caption (n,). The bootstrap draws whole groups, since pictures of one
            caption are not independent.
        frechet: Prepared distances to ``reference`` for the bootstrap.

    Raises:
        UserError: a side has fewer than two pictures.
    """
    check_counts(len(generated), len(reference))
    score = inception_score(generated.logits, seed=seed) if generated.logits is not None else None
    fid_error = score_error = None
    if bootstrap:
        distance = frechet or FrechetTo(reference.vectors)
        sets = resampled(len(generated), groups, bootstrap, seed)
        fid_error = float(np.std([distance(generated.vectors[rows]) for rows in sets], ddof=1))
        if generated.logits is not None:
            score_error = float(
                np.std([inception_score(generated.logits[rows], seed=seed).mean for rows in sets], ddof=1)
            )
    return Figures(
        fid=frechet_distance(generated.vectors, reference.vectors),
        fid_error=fid_error,
        **kernel_distance(generated.vectors, reference.vectors, seed=seed)._asdict(),
        score=score and score.mean,
        score_std=score and score.std,
        score_splits=score and score.splits,
        score_error=score_error,
        **precision_recall(generated.vectors, reference.vectors)._asdict(),
        n_generated=len(generated),
        n_reference=len(reference),
        feature_dimensions=generated.vectors.shape[1],
    )


def warnings_about(figures: Figures, score_name: str) -> list[str]:
    """Return warnings about biased or undefined metrics when there are too few pictures."""
    warnings = []
    few = [
        f"{count} {side}"
        for side, count in (("generated", figures.n_generated), ("reference", figures.n_reference))
        if count <= figures.feature_dimensions
    ]
    if few:
        warnings.append(
            f"{' and '.join(few)} pictures for {figures.feature_dimensions} feature dimensions: the covariance is "
            "singular and FID is biased upwards; compare it only with FIDs of as many pictures"
        )
    if figures.score is not None and figures.n_generated < PICTURES_PER_SPLIT:
        warnings.append(f"{score_name} of {figures.n_generated} pictures is biased downwards; it grows with the count")
    if figures.precision is None:
        warnings.append(f"precision and recall need more than {NEIGHBOURS} pictures on each side")
    return warnings


class FrechetTo:
    """Frechet distances of many sets to one reference (m, d), whose covariance is factorized once.

    The result is that of :func:`frechet_distance`. tr (S1 S2)^(1/2) is computed as the sum of the singular values of
    X1 S2^(1/2) / sqrt(n - 1), where X1 are the centred features, in float64 on ``device``.
    """

    def __init__(self, reference: Tensor, device: torch.device | str = "cpu") -> None:
        x = reference.to(device, torch.float64)
        self.mean = x.mean(dim=0)
        covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self.trace = float(covariance.trace())

    def __call__(self, features: Tensor) -> float:
        """Return the distance of features (n, d), n >= 2."""
        x = features.to(self.root.device, torch.float64)
        mean = x.mean(dim=0)
        x = x - mean
        y = x @ self.root
        gram = (y.T @ y if len(y) > y.shape[1] else y @ y.T) / (len(x) - 1)
        root_trace = float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())
        trace = float(x.square().sum()) / (len(x) - 1)
        return max(0.0, float((mean - self.mean).square().sum()) + trace + self.trace - 2 * root_trace)


def resampled(n: int, groups: NDArray[np.int64] | None, rounds: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of ``rounds`` bootstrap sets of n pictures, drawn by whole groups if ``groups`` is given."""
    members = (
        np.split(np.argsort(groups, kind="stable"), np.cumsum(np.unique(groups, return_counts=True)[1])[:-1])
        if groups is not None
        else None
    )
    count = n if members is None else len(members)
    drawn = [numpy_generator(seed, "bootstrap", number).integers(0, count, count) for number in range(rounds)]
    return drawn if members is None else [np.concatenate([members[group] for group in one]) for one in drawn]


def precision_recall(generated: Tensor, reference: Tensor) -> PrecisionRecall:
    """Return the shares of features (n, d) and (m, d) that lie within the manifold of the other side."""
    if min(len(generated), len(reference)) <= NEIGHBOURS:
        return PrecisionRecall()
    found = prc_features_to_metric(
        generated.double(),
        reference.double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=DISTANCES_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )

    def binomial_error(share: float, count: int) -> float:
        return float((share * (1 - share) / count) ** 0.5)

    precision, recall = found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
    return PrecisionRecall(
        precision, binomial_error(precision, len(generated)), recall, binomial_error(recall, len(reference))
    )


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (n, d) and (m, d), in float64."""
    one, other = (fid_features_to_statistics(features.double()) for features in (first, second))
    # Rounding can make the distance of equal sets slightly negative.
    return max(0.0, float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]))


def kernel_distance(first: Tensor, second: Tensor, *, seed: int = 0) -> KernelDistance:
    """Return the unbiased squared MMD under (x.y / d + 1)^3 over random subsets of at most 1,000 pictures a side."""
    size = min(KID_SUBSET_SIZE, len(first), len(second))
    subsets = 1 if size == len(first) == len(second) else KID_SUBSETS
    figures = kid_features_to_metric(
        first.double(),
        second.double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed % 2**32,
        verbose=False,
    )
    std = figures[KEY_METRIC_KID_STD] if subsets > 1 else None
    return KernelDistance(figures[KEY_METRIC_KID_MEAN], std, size, subsets)


def inception_score(logits: Tensor, *, seed: int = 0) -> InceptionScore:
    """Return exp(mean KL(p(y|x) || p(y))) of class logits (n, classes) over up to ten splits of at least 1,000."""
    splits = max(1, min(MAX_SPLITS, len(logits) // PICTURES_PER_SPLIT))
    # A class whose probability underflows to 0 in every picture would give 0 times infinity in place of 0.
    logits = (logits.double() - logits.double().amax(dim=1, keepdim=True)).clamp(min=-700)
    figures = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed % 2**32)
    std = figures[KEY_METRIC_ISC_STD] if splits > 1 else None
    return InceptionScore(figures[KEY_METRIC_ISC_MEAN], std, splits)


def check_counts(generated: int, reference: int, name: str = "generated pictures") -> None:
    """Check that both sides have at least two pictures; ``name`` stands for the generated ones in the message.

    Raises:
        UserError: a side has fewer than two.
    """
    for what, count in ((name, generated), ("reference pictures", reference)):
        if count < 2:
            raise UserError(f"{what}: {count} given; a distribution needs two or more")
