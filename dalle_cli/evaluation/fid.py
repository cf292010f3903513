"""FID, KID and inception score of generated pictures against reference pictures, by torch-fidelity.

FID (Heusel et al. 2017) is the Frechet distance of two Gaussians fitted to features, KID (Binkowski et al.
2018) the squared maximum mean discrepancy under a cubic kernel, and the inception score (Salimans et al.
2016) the exponential of the mean KL divergence of each picture's class distribution from their average.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from dalle_cli.errors import UserError
from dalle_cli.evaluation.features import Extracted, Features

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
PICTURES_A_SPLIT = 1000


def evaluate(
    generated: Dataset[Tensor],
    reference: Dataset[Tensor],
    features: Features,
    *,
    batch_size: int = 64,
    workers: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """The metrics of two datasets of (3, H, W) uint8 pictures, each of one size; see :func:`compare`."""
    _check_counts(_length(generated), _length(reference))
    return compare(
        features.extract(generated, batch_size=batch_size, workers=workers),
        features.extract(reference, batch_size=batch_size, workers=workers),
        features,
        seed=seed,
    )


def compare(generated: Extracted, reference: Extracted, features: Features, *, seed: int = 0) -> dict[str, Any]:
    """FID, KID and, where the features have class logits, the inception score of ``generated``.

    Takes features already extracted, so that many subsets can be compared with one reference. Keys:
    ``features`` (what was used), ``fid``, ``kid_mean``, ``kid_std`` (None where one subset holds every
    picture), ``kid_subset_size``, ``kid_subsets``, the score as ``inception_score`` or ``clip_is`` with
    ``_std`` and ``_splits``, ``n_generated``, ``n_reference``, ``feature_dimensions`` and ``warnings``.
    ``seed`` chooses KID's subsets and the score's splits. Raises UserError for fewer than two pictures on a
    side.
    """
    _check_counts(len(generated), len(reference))
    smaller = min(len(generated), len(reference))
    dimensions = generated.vectors.shape[1]
    warnings = list(features.warnings)
    if smaller <= dimensions:
        warnings.append(
            f"{smaller} pictures for {dimensions} feature dimensions: the covariance is singular and FID is "
            "biased upwards; compare only figures of equal counts"
        )
    result: dict[str, Any] = {"features": features.name}
    result["fid"] = frechet_distance(generated.vectors, reference.vectors)
    result |= kernel_distance(generated.vectors, reference.vectors, seed=seed)
    if generated.logits is not None:
        key = features.score_key
        mean, std, splits = inception_score(generated.logits, seed=seed)
        result |= {key: mean, f"{key}_std": std, f"{key}_splits": splits}
        if len(generated) < PICTURES_A_SPLIT:
            warnings.append(f"{key} of {len(generated)} pictures is biased downwards; it grows with the count")
    return result | {
        "n_generated": len(generated),
        "n_reference": len(reference),
        "feature_dimensions": dimensions,
        "warnings": warnings,
    }


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


def _length(pictures: Dataset[Tensor]) -> int:
    return len(pictures)  # type: ignore[arg-type]


def _check_counts(generated: int, reference: int) -> None:
    for what, count in (("generated", generated), ("reference", reference)):
        if count < 2:
            raise UserError(f"{what} pictures: {count} given; a distribution needs two or more")
