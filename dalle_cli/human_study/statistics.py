"""Statistics of a study: shares with confidence intervals, and agreement between annotators."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A binomial share and its Wilson interval (E. B. Wilson, JASA 1927) at 95% confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Fleiss' kappa, and the observed agreement: the mean share of annotator pairs that agree."""

    kappa: float | None
    """None if every vote went to one category, where chance agreement is 1."""
    observed: float


def wilson(wins: int, total: int) -> Share | None:
    """Return ``wins / total`` with its Wilson interval; None if ``total`` is 0."""
    if total == 0:
        return None
    interval = binomtest(wins, total).proportion_ci(CONFIDENCE, method="wilson")
    return Share(wins / total, float(interval.low), float(interval.high))


def sign_test(wins: int, total: int) -> float | None:
    """Return the two-sided p-value of ``wins`` under equal preference; None if ``total`` is 0."""
    return float(binomtest(wins, total).pvalue) if total else None


def fleiss_kappa(counts: NDArray[np.int64]) -> Agreement | None:
    """Return the agreement of votes ``counts`` (items, categories) (J. L. Fleiss, Psychological Bulletin 1971).

    Items may have different numbers of votes: each item's agreement counts once, and chance agreement is taken from
    all votes. With equal numbers this is Fleiss' kappa. Items with fewer than two votes are left out; None if none is
    left.
    """
    if counts.ndim != 2 or (counts < 0).any():
        raise ValueError(f"votes are counts (items, categories), not {counts.shape}")
    counts = counts[counts.sum(axis=1) >= 2].astype(np.float64)
    if not len(counts):
        return None
    votes = counts.sum(axis=1)
    observed = float((((counts**2).sum(axis=1) - votes) / (votes * (votes - 1))).mean())
    by_chance = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    # Not by_chance == 1, which rounding could miss.
    unanimous = np.count_nonzero(counts.sum(axis=0)) == 1
    return Agreement(None if unanimous else (observed - by_chance) / (1 - by_chance), observed)
