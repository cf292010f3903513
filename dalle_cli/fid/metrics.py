"""FID, KID, inception score, precision and recall of generated pictures against real ones, by torch-fidelity.

FID (Heusel et al. 2017) is the Frechet distance of two Gaussians fitted to features, KID (Binkowski et al.
2018) the squared maximum mean discrepancy under a cubic kernel, and the inception score (Salimans et al.
2016) the exponential of the mean KL divergence of each picture's class distribution from their average.
Precision is the share of generated pictures that lie among the real ones, recall the share of real ones that lie
among the generated, where a set reaches as far from each of its members as the third nearest other member
(Kynkaanniemi et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from dalle_cli.errors import UserError
from dalle_cli.fid.features import Extracted, Features
from dalle_cli.randomness import numpy_generator

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
PICTURES_A_SPLIT = 1000
NEIGHBOURS = 3
"""Of precision and recall."""
DISTANCES_AT_ONCE = 4096
"""Rows and columns of a block of distances between pictures."""


def compare(
    generated: Extracted,
    reference: Extracted,
    features: Features,
    *,
    seed: int = 0,
    bootstrap: int = 0,
    groups: NDArray[np.int64] | None = None,
    frechet: FrechetTo | None = None,
) -> dict[str, Any]:
    """FID, KID, precision, recall and, where the features have class logits, the inception score of ``generated``.

    Takes features already extracted, so that many subsets can be compared with one reference. Keys:
    ``features`` (what was used), ``fid``, ``kid_mean``, ``kid_std`` (over subsets; None where one subset holds every
    picture), ``kid_subset_size``, ``kid_subsets``, the score as ``inception_score`` or ``clip_is`` with
    ``_std`` and ``_splits``, ``precision`` and ``recall`` (None with too few pictures) with ``_error``, the binomial
    standard error, ``n_generated``, ``n_reference``, ``feature_dimensions`` and ``warnings``. ``seed`` chooses KID's
    subsets and the score's splits.

    With ``bootstrap`` rounds, ``fid`` and the score also get ``_error``: the standard deviation of the figure over
    as many sets drawn from the generated pictures with replacement, whole ``groups`` (n,) at a time (the pictures of
    one caption are no independent draws). The reference is held fixed, as it is for published figures.

    Raises UserError for fewer than two pictures on a side.
    """
    check_counts(len(generated), len(reference))
    dimensions = generated.vectors.shape[1]
    warnings = list(features.warnings)
    few = [f"{n} {side}" for side, n in (("generated", len(generated)), ("reference", len(reference)))
           if n <= dimensions]  # fmt: skip
    if few:
        warnings.append(
            f"{' and '.join(few)} pictures for {dimensions} feature dimensions: the covariance is singular and FID is "
            "biased upwards; compare only figures of equal counts"
        )
    result: dict[str, Any] = {"features": features.name}
    result["fid"] = frechet_distance(generated.vectors, reference.vectors)
    result |= kernel_distance(generated.vectors, reference.vectors, seed=seed)
    key = features.score_key
    if generated.logits is not None:
        mean, std, splits = inception_score(generated.logits, seed=seed)
        result |= {key: mean, f"{key}_std": std, f"{key}_splits": splits}
        if len(generated) < PICTURES_A_SPLIT:
            warnings.append(f"{key} of {len(generated)} pictures is biased downwards; it grows with the count")
    result |= precision_recall(generated.vectors, reference.vectors)
    if result["precision"] is None:
        warnings.append(f"precision and recall need more than {NEIGHBOURS} pictures on each side")
    if bootstrap:
        distance = frechet or FrechetTo(reference.vectors, features.device)
        sets = list(resampled(len(generated), groups, bootstrap, seed))
        result["fid_error"] = float(np.std([distance(generated.vectors[rows]) for rows in sets], ddof=1))
        if generated.logits is not None:
            scores = [inception_score(generated.logits[rows], seed=seed)[0] for rows in sets]
            result[f"{key}_error"] = float(np.std(scores, ddof=1))
    return result | {
        "n_generated": len(generated),
        "n_reference": len(reference),
        "feature_dimensions": dimensions,
        "warnings": warnings,
    }


class FrechetTo:
    """Frechet distances of many sets to one reference (m, d), whose part of the work is done once.

    tr (S1 S2)^(1/2) is the sum of the singular values of X1 S2^(1/2) / sqrt(n - 1), X1 the centred features: equal
    to :func:`frechet_distance`, by two symmetric eigenproblems in place of a general one. In double precision on
    ``device``.
    """

    def __init__(self, reference: Tensor, device: torch.device | str = "cpu") -> None:
        x = reference.to(device, torch.float64)
        self.mean = x.mean(dim=0)
        covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self.trace = float(covariance.trace())

    def __call__(self, features: Tensor) -> float:
        """Of features (n, d), n >= 2."""
        x = features.to(self.root.device, torch.float64)
        mean = x.mean(dim=0)
        x = x - mean
        y = x @ self.root
        gram = (y.T @ y if len(y) > y.shape[1] else y @ y.T) / (len(x) - 1)
        root_trace = float(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum())
        trace = float(x.square().sum()) / (len(x) - 1)
        return max(0.0, float((mean - self.mean).square().sum()) + trace + self.trace - 2 * root_trace)


def resampled(n: int, groups: NDArray[np.int64] | None, rounds: int, seed: int) -> Sequence[NDArray[np.int64]]:
    """Rows of ``rounds`` bootstrap sets of n pictures: as many groups as there are, drawn with replacement."""
    members = (
        np.split(np.argsort(groups, kind="stable"), np.cumsum(np.unique(groups, return_counts=True)[1])[:-1])
        if groups is not None
        else None
    )
    count = n if members is None else len(members)
    drawn = [numpy_generator(seed, "bootstrap", number).integers(0, count, count) for number in range(rounds)]
    return drawn if members is None else [np.concatenate([members[group] for group in groups_]) for groups_ in drawn]


def precision_recall(generated: Tensor, reference: Tensor) -> dict[str, float | None]:
    """Shares of features (n, d) and (m, d) that lie among those of the other side, and their standard errors.

    None where a side has no more pictures than the third neighbour needs.
    """
    if min(len(generated), len(reference)) <= NEIGHBOURS:
        return dict.fromkeys(("precision", "precision_error", "recall", "recall_error"))
    found = prc_features_to_metric(
        generated.double(),
        reference.double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=DISTANCES_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )
    shares = {"precision": (found[KEY_METRIC_PRECISION], generated), "recall": (found[KEY_METRIC_RECALL], reference)}
    result: dict[str, float | None] = {}
    for name, (share, of) in shares.items():
        result |= {name: share, f"{name}_error": (share * (1 - share) / len(of)) ** 0.5}
    return result


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (n, d) and (m, d), in double precision."""
    one, other = (fid_features_to_statistics(features.double()) for features in (first, second))
    # Rounding can leave a distance of equal sets a hair below zero.
    return max(0.0, float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]))


def kernel_distance(first: Tensor, second: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Unbiased squared MMD under (x.y / d + 1)^3 over random subsets of at most 1,000 pictures a side."""
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
    return {
        "kid_mean": figures[KEY_METRIC_KID_MEAN],
        "kid_std": figures[KEY_METRIC_KID_STD] if subsets > 1 else None,
        "kid_subset_size": size,
        "kid_subsets": subsets,
    }


def inception_score(logits: Tensor, *, seed: int = 0) -> tuple[float, float | None, int]:
    """exp(mean KL(p(y|x) || p(y))) of class logits (n, classes): mean, deviation over splits, their number.

    Up to ten splits of at least 1,000 pictures; the deviation of a single split is None.
    """
    splits = max(1, min(SCORE_SPLITS, len(logits) // PICTURES_A_SPLIT))
    # A class that underflows to zero in every picture would make 0 x infinity of a term that is zero.
    logits = (logits.double() - logits.double().amax(dim=1, keepdim=True)).clamp(min=-700)
    figures = isc_features_to_metric(logits, splits, shuffle=True, rng_seed=seed % 2**32)
    return figures[KEY_METRIC_ISC_MEAN], figures[KEY_METRIC_ISC_STD] if splits > 1 else None, splits


def check_counts(generated: int, reference: int, name: str = "generated pictures") -> None:
    """Raises UserError for a side of fewer than two pictures."""
    for what, count in ((name, generated), ("reference pictures", reference)):
        if count < 2:
            raise UserError(f"{what}: {count} given; a distribution needs two or more")
